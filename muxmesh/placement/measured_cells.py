"""What `muxmesh profile` measures, as plain values: cells, how far their samples lie apart, and slowdowns. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from muxmesh.types import Role

MAX_CONTENTION = 10.0
"""Limit of the contention factor: more is a mistake or a measurement that something else disturbed."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement of a model on ``share`` percent of the device.

    A prefill of ``batch`` prompts of ``length`` tokens, or one decode step of ``batch`` sequences with ``length``
    tokens of context. ``model``: the name in the profile.
    """

    model: str
    role: Role
    share: int
    batch: int
    length: int

    def __str__(self) -> str:
        """Like `smollm2 decode, share 50, batch 4, length 256`."""
        return f"{self.model} {self.role}, share {self.share}, batch {self.batch}, length {self.length}"


def each_beside(group: Sequence[Cell]) -> Iterator[tuple[Cell, tuple[Cell, ...]]]:
    """Each worker of ``group`` with those that it is beside, as in `Slowdown`."""
    return ((cell, (*group[:index], *group[index + 1 :])) for index, cell in enumerate(group))


@dataclass(frozen=True, slots=True)
class SampleSummary:
    """The median of the samples of a cell, and how far they lie from it."""

    seconds: float
    """The median."""
    spread: float
    """Median of the samples' deviations from ``seconds``, relative to it."""
    repeats: int
    """Number of samples."""
    outliers: int
    """Samples that are far from the others; they are part of the median."""


@dataclass(frozen=True, slots=True)
class Slowdown:
    """One worker alone and beside others: median seconds of what it computes again and again."""

    worker: Cell
    beside: tuple[Cell, ...]
    alone_s: float
    beside_s: float

    @property
    def ratio(self) -> float:
        return self.beside_s / self.alone_s

    @property
    def others(self) -> float:
        """Sum of the others' shares; 1 is the whole device."""
        return sum(other.share for other in self.beside) / 100


@dataclass(frozen=True, slots=True)
class MeasuredSettings:
    """What the step times of a model depend on, beside the machine: settings as in mesh.yaml, resolved."""

    engine: str
    weights_fingerprint: str
    dtype: str
    kv_cache_dtype: str
    block_size: int
    step_token_budget: int
    max_num_seqs: int
    max_model_len: int
    threads: int | None = None
    cuda_graphs: bool = True
    continuous_decode_steps: int | None = None
