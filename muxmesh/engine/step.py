"""One step of an engine as plain values: what the scheduler plans, a runner computes, the scheduler applies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from muxmesh.cost import StepShape, context_of
from muxmesh.types import Sampling, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Draw:
    """Draw a token after the chunk. ``output_index`` is its place in the answer; ``banned`` may not be drawn.

    ``sequence`` tells apart the answers of one request. The prompt and the answer so far are given only if the
    sampling looks back at them.
    """

    sampling: Sampling
    output_index: int
    banned: frozenset[int] = frozenset()
    sequence: int = 0
    prompt_token_ids: Sequence[int] = ()
    output_token_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Score:
    """Wanted log-probabilities of prompt tokens: ``next_token_ids[i]`` follows token i of the chunk."""

    next_token_ids: tuple[int, ...]
    num_candidates: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute ``token_ids`` at positions [start, start + len) of one job, whose KV lies in ``block_ids``.

    ``draw`` is None for a part of a prompt that is not the last one.
    """

    job_id: int
    start: int
    token_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    draw: Draw | None = None
    score: Score | None = None

    @property
    def num_logit_rows(self) -> int:
        """How many of the last tokens need logits."""
        return len(self.token_ids) if self.score else int(self.draw is not None)


@dataclass(frozen=True, slots=True)
class Step:
    """What is computed together, in one pass over the weights."""

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
class Drawn:
    """A drawn token, and its log-probability if that is wanted."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """By job id: what the `Draw` and the `Score` of its chunk gave. ``kv_bytes_written`` into the pool."""

    drawn: Mapping[int, Drawn]
    scored: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    kv_bytes_written: int = 0


class Runner(Protocol):
    """Computes steps. Called from one thread only; blocks while it computes."""

    def load(self) -> None:
        """Loads and warms up. Raises ModelUnsupported."""

    def run(self, step: Step) -> StepOutcome:
        """Computes the step. Whatever it raises fails the step's jobs and leaves the runner usable."""
