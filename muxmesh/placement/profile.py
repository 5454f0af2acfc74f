"""What placement knows of models and machines: step times, bytes, contention. Pure; knows no file format."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from muxmesh.placement.measured_cells import Cell, MeasuredSettings, SampleSummary, Slowdown
from muxmesh.placement.step_table import StepTable


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """The machine on which a profile was measured."""

    device: str
    """`cpu` or `cuda`."""
    name: str
    """The device as its vendor calls it."""
    num_devices: int
    memory_bytes: int
    """Memory of one device, for weights, KV and what workers need beside them."""
    cores: int = 0
    """CPU cores that the units of a CPU divide among themselves; 0 for GPUs."""


@dataclass(frozen=True, slots=True)
class PrototypeConstants:
    """What MuxServe's prototype assumes of a model of its profile, see `reference_estimator`."""

    weights_gb: float
    """Of the whole model: 2 GB for each nominal billion of parameters."""
    sequence_overhead_s: float
    """Added to a decode step for each sequence of its batch."""
    prefill_share: int
    """Percent of the device, in the published plans."""


@dataclass(frozen=True)
class ModelProfile:
    """One model: its bytes, and its measured step times by tensor-parallel degree."""

    name: str
    weights_bytes: int
    """Of the whole model; each of n tensor-parallel devices holds an n-th."""
    kv_bytes_per_token: int
    tables: Mapping[int, StepTable]
    """As measured, by tensor-parallel degree."""
    settings: MeasuredSettings | None = None
    """None if the times are not of an engine here, as those of MuxServe."""
    samples: Mapping[Cell, SampleSummary] = field(default_factory=dict)
    """The samples of each cell that was measured here, at tensor-parallel degree 1."""

    prototype: PrototypeConstants | None = None
    """None if the profile is not MuxServe's."""

    @property
    def median_spread(self) -> float:
        """Of the samples, of which there is one at least."""
        return statistics.median(one.spread for one in self.samples.values())

    @property
    def num_outliers(self) -> int:
        """Of all samples."""
        return sum(one.outliers for one in self.samples.values())

    @cached_property
    def smoothed(self) -> Mapping[int, StepTable]:
        """The tables made monotone and without gaps."""
        return {degree: table.smoothed() for degree, table in self.tables.items()}


@dataclass(frozen=True)
class Profile:
    """All that was measured on one machine."""

    machine: MachineFacts
    models: Mapping[str, ModelProfile]
    contention: float = 0.0
    """A step takes ``1 + contention * o`` times as long while other workers compute whose shares sum to o in [0, 1]."""
    contention_error: float | None = None
    """Root of the mean squared error of the measured slowdowns; None if there are none."""
    slowdowns: tuple[Slowdown, ...] = ()
    """What ``contention`` was fitted to."""
    muxmesh: str = ""
    """Version that measured."""
    date: str = ""
    """Of the last measurement, in ISO format."""
