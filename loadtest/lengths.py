"""Prompt and output lengths: a distribution of each, or pairs from a CSV file. Pure, except that it reads the file."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from pathlib import Path

from loadtest.files import read_csv
from muxmesh.errors import ConfigError
from muxmesh.quoting import named, quoted

LengthSampler = Callable[[random.Random], tuple[int, int]]
"""Returns (prompt tokens, output tokens), both at least 1."""

MAX_TOKENS = 10_000_000
"""Upper bound of every length in tokens: more than any model takes, and few enough to be generated."""
_FORM = re.compile(r"([DNUE])\(([^()]*)\)(?:/\(([^()]*)\))?")
HELP = (
    "D(2000,200): always 2000 prompt and 200 output tokens; N(480,240)/(300,150): normal, mean and standard deviation "
    "of prompt/output; U(10,20)/(5,9): uniform; E(480)/(300): exponential; or a CSV file with columns n_in,n_out"
)


def parse_lengths(text: str) -> LengthSampler:
    """Returns the sampler that ``text`` describes; see `HELP`. Raises ConfigError."""
    match = _FORM.fullmatch(text.replace(" ", ""))
    if match is None:
        if Path(text).is_file():
            return _from_file(Path(text))
        raise ConfigError(f"lengths={named(text)}: is neither a distribution nor a file; {HELP}")
    kind, first, second = match.groups()
    prompt, output = _numbers(text, first), _numbers(text, second) if second is not None else None
    num_parameters = {"D": 2, "N": 2, "U": 2, "E": 1}[kind]
    if kind == "D":
        if output is not None or len(prompt) != 2:
            raise ConfigError(f"lengths={named(text)}: D takes prompt and output tokens, like D(2000,200)")
        return lambda rng: (_whole(prompt[0]), _whole(prompt[1]))
    if output is None or len(prompt) != num_parameters or len(output) != num_parameters:
        raise ConfigError(
            f"lengths={named(text)}: {kind} takes {num_parameters} number(s) for prompt and for output; {HELP}"
        )
    if kind == "U" and not (prompt[0] <= prompt[1] and output[0] <= output[1]):
        raise ConfigError(f"lengths={named(text)}: U takes the smaller number first, like U(10,20)/(5,9)")
    sample = {"N": _normal, "U": _uniform, "E": _exponential}[kind]
    return lambda rng: (_whole(sample(rng, prompt)), _whole(sample(rng, output)))


def _numbers(text: str, inside: str) -> list[float]:
    try:
        numbers = [float(part) for part in inside.split(",")]
    except ValueError:
        raise ConfigError(f"lengths={named(text)}: {quoted(inside)} is not a list of numbers; {HELP}") from None
    if not all(0 <= number <= MAX_TOKENS for number in numbers):
        raise ConfigError(f"lengths={named(text)}: every number must be from 0 to {MAX_TOKENS}")
    return numbers


def _normal(rng: random.Random, parameters: list[float]) -> float:
    return rng.normalvariate(parameters[0], parameters[1])


def _uniform(rng: random.Random, parameters: list[float]) -> float:
    return rng.uniform(parameters[0], parameters[1])


def _exponential(rng: random.Random, parameters: list[float]) -> float:
    return rng.expovariate(1 / parameters[0]) if parameters[0] else 0.0


def _whole(number: float) -> int:
    return min(MAX_TOKENS, max(1, round(number)))


def _from_file(path: Path) -> LengthSampler:
    pairs = []
    for number, row in read_csv(path, ("n_in", "n_out")):
        try:
            num_input, num_output = float(row["n_in"]), float(row["n_out"])
        except (TypeError, ValueError):
            raise ConfigError(f"{path}: line {number}: n_in and n_out must be numbers") from None
        if not (-math.inf < num_input <= MAX_TOKENS and -math.inf < num_output <= MAX_TOKENS):
            raise ConfigError(f"{path}: line {number}: n_in and n_out must be numbers up to {MAX_TOKENS}")
        pairs.append((_whole(num_input), _whole(num_output)))
    if not pairs:
        raise ConfigError(f"{path}: has no rows")
    return lambda rng: pairs[rng.randrange(len(pairs))]
