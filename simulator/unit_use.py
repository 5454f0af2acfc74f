"""What one unit did in a simulation: its device, its workers, and the sequences that it pre-empted. Pure values."""

from __future__ import annotations

from dataclasses import dataclass

from muxmesh.types import Role


@dataclass(frozen=True, slots=True)
class WorkerUse:
    """One worker. ``share``: of the device. ``granted_s``: seconds for which it had the grant to compute."""

    model: str
    role: Role
    share: float
    granted_s: float
    num_grants: int


@dataclass(frozen=True, slots=True)
class ModelSwitches:
    """How often one model woke, and for how many seconds it was waking."""

    num_wakes: int
    waking_s: float


@dataclass(frozen=True, slots=True)
class UnitUse:
    """``busy_s``: at least one worker computed. ``share_s``: the shares of the computing workers, summed over time, so
    that 1 s of it is the whole device for a second; more than ``busy_s`` with over-subscription. ``peak_share``: the
    largest of these sums.

    ``num_displaced``: sequences that others pre-empted from the batch; they kept their KV. ``num_requeued``: those that
    were pre-empted for memory and computed again. ``num_swapped``: those that were swapped out for it.
    """

    busy_s: float
    share_s: float
    peak_share: float
    workers: tuple[WorkerUse, ...]
    num_displaced: int
    num_requeued: int
    num_swapped: int
    swapped_bytes: int
    """Copied out and in."""
    switches: dict[str, ModelSwitches]
    """By model; only of units in which models sleep."""
