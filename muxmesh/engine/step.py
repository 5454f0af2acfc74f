"""One step of an engine as plain values: what the scheduler plans, a runner computes, the scheduler applies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from muxmesh.types import Sampling


@dataclass(frozen=True, slots=True)
class Draw:
    """Draw the token after the chunk. ``output_index`` is its place in the answer; ``banned`` may not be drawn."""

    sampling: Sampling
    output_index: int
    banned: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute ``token_ids`` at positions [start, start + len) of one job, whose KV lies in ``block_ids``.

    ``draw`` is None for a part of a prompt that is not the last one.
    """

    job_id: int
    start: int
    token_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    draw: Draw | None


@dataclass(frozen=True, slots=True)
class Step:
    """What is computed together, in one pass over the weights."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """The drawn token of each chunk with a ``draw``, by job id; ``kv_bytes_written`` into the pool."""

    drawn: Mapping[int, int]
    kv_bytes_written: int = 0


class Runner(Protocol):
    """Computes steps. Called from one thread only; blocks while it computes."""

    def load(self) -> None:
        """Loads and warms up. Raises ModelUnsupported."""

    def run(self, step: Step) -> StepOutcome:
        """Computes the step. Whatever it raises fails the step's jobs and leaves the runner usable."""
