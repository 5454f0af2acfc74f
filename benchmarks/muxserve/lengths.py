"""Prompt and output lengths: sampled from a file of ShareGPT's, scaled to a mean."""

from __future__ import annotations

import csv
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from loadtest.files import read_lines
from muxmesh.errors import ConfigError

MIN_PROMPT_TOKENS, MIN_OUTPUT_TOKENS = 16, 4
"""Shorter ones are left out, as in vLLM's benchmarks."""
MAX_PROMPT_TOKENS, MAX_TOKENS = 1024, 2048
"""Of a prompt, and of prompt and output together. Longer ones are left out."""

OutputSpread = Literal["file", "exponential"]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Pairs of prompt and output tokens, with their means."""

    pairs: tuple[tuple[int, int], ...]
    mean_prompt: float
    mean_output: float

    def sample(
        self,
        random: Random,
        count: int,
        mean_prompt: float,
        mean_output: float,
        spread: OutputSpread = "file",
        longest_output: float = MAX_TOKENS,
    ) -> list[tuple[int, int]]:
        """``count`` pairs whose expected means are the given ones; each length is at least 2 tokens.

        ``spread``: outputs as in the file, or with an exponential distribution that ends at ``longest_output``.
        """
        prompt_scale, output_scale = mean_prompt / self.mean_prompt, mean_output / self.mean_output
        chosen = random.choices(self.pairs, k=count)
        prompts = [max(2, round(prompt * prompt_scale)) for prompt, _ in chosen]
        if spread == "exponential":
            decay = _decay_tokens(mean_output, longest_output)
            outputs = [min(random.expovariate(1 / decay), longest_output) for _ in chosen]
        else:
            outputs = [output * output_scale for _, output in chosen]
        return [(prompt, max(2, round(output))) for prompt, output in zip(prompts, outputs, strict=True)]


def lengths_of(pairs: list[tuple[int, int]]) -> Lengths:
    """The pairs within the limits above. Raises ValueError if there are none."""
    kept = tuple(
        (prompt, output)
        for prompt, output in pairs
        if MIN_PROMPT_TOKENS <= prompt <= MAX_PROMPT_TOKENS
        and output >= MIN_OUTPUT_TOKENS
        and prompt + output <= MAX_TOKENS
    )
    if not kept:
        raise ValueError("no pair is within the limits")
    return Lengths(kept, statistics.fmean(one for one, _ in kept), statistics.fmean(two for _, two in kept))


def read_lengths(path: Path) -> Lengths:
    """Reads a CSV with a line of names and then `prompt tokens,output tokens`, gzip or not. Raises ConfigError."""
    rows = list(csv.reader(read_lines(path)))[1:]
    try:
        return lengths_of([(int(row[0]), int(row[1])) for row in rows])
    except (ValueError, IndexError) as error:
        raise ConfigError(f"{path}: is no file of lengths (`n_in,n_out` in each line): {error}") from error


def _decay_tokens(mean: float, longest: float) -> float:
    """The parameter d of an exponential distribution whose samples, cut at ``longest``, have the mean ``mean``.

    The mean is ``d * (1 - exp(-longest / d))``, which grows with d: found by bisection.
    """
    low, high = mean, 100 * longest
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * (1 - math.exp(-longest / middle)) < mean else (low, middle)
    return high
