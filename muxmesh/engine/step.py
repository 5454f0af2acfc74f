"""One step of an engine as plain values: the scheduler plans it, a runner computes it, the scheduler applies it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from muxmesh.step_cost import StepShape, context_of
from muxmesh.types import Sampling, TokenLogprobs


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """How to sample a token after a chunk. ``output_index`` is its index in the output; ``banned`` is never sampled.

    ``sequence_index`` numbers the output sequences of one request. ``token_bitmask`` allows tokens (uint32, bit i of
    word w is token ``32 * w + i``), None all; at least one allowed token is not banned. Prompt and output so far are
    given only if the sampling has penalties.
    """

    sampling: Sampling
    output_index: int
    banned: frozenset[int] = frozenset()
    sequence_index: int = 0
    prompt_token_ids: Sequence[int] = ()
    output_token_ids: Sequence[int] = ()
    token_bitmask: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class PromptScoring:
    """Requested log-probabilities of prompt tokens: ``next_token_ids[i]`` follows token i of the chunk."""

    next_token_ids: tuple[int, ...]
    num_candidates: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute ``token_ids`` at positions [start, start + len) of one job, whose KV is in ``block_ids``.

    ``sample`` is None for a part of a prompt that is not the last one.
    """

    job_id: int
    start: int
    token_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    sample: SampleSpec | None = None
    scoring: PromptScoring | None = None

    @property
    def num_logit_rows(self) -> int:
        """How many of the last tokens need logits."""
        return len(self.token_ids) if self.scoring else int(self.sample is not None)


@dataclass(frozen=True, slots=True)
class Step:
    """Chunks that are computed together, in one pass over the weights."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def shape(self) -> StepShape:
        """What its time depends on."""
        context = sum(context_of(chunk.start, len(chunk.token_ids)) for chunk in self.chunks)
        return StepShape(self.num_tokens, context, len(self.chunks))


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A sampled token, and its log-probabilities if they are requested."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """By job id: the tokens that the `SampleSpec` of its chunk gave, and the log-probabilities of its `PromptScoring`.

    ``kv_bytes_written``: into the pool.
    """

    sampled: Mapping[int, SampledToken]
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    kv_bytes_written: int = 0


class Runner(Protocol):
    """Computes steps, up to the sampled tokens: a device may sample by itself. Called from one thread; blocks."""

    def load(self) -> None:
        """Loads and warms up. Raises ModelUnsupported."""

    def run(self, step: Step) -> StepOutcome:
        """Computes the step. Whatever it raises fails the step's jobs and leaves the runner usable."""
