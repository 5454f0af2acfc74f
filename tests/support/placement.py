"""Small made-up profiles and workloads for tests of placement."""

from __future__ import annotations

from collections.abc import Sequence

from muxmesh.placement.plan import Cluster, ModelLoad
from muxmesh.placement.profile import MachineFacts, ModelProfile, Profile
from muxmesh.placement.step_table import StepTable, table_from_cells

SHARES, BATCHES, LENGTHS = (30, 60, 90), (1, 2, 4, 8), (128, 256, 512)


def table(num_devices: int, weight: float) -> StepTable:
    """A prefill takes ``weight`` ms per token, a decode step ``weight * (10 + batch)`` ms, on ``num_devices`` less."""
    speed = [num_devices * share / 90 for share in SHARES]
    prefill = [[[weight * batch * length / 1000 / one for length in LENGTHS] for batch in BATCHES] for one in speed]
    decode = [[[weight * (10 + batch) / 1000 / one for _ in LENGTHS] for batch in BATCHES] for one in speed]
    return table_from_cells(SHARES, BATCHES, LENGTHS, prefill, decode)


def profile(contention: float = 0.0, kinds: Sequence[tuple[str, float, int]] = (("small", 0.1, 100),)) -> Profile:
    """A profile of models as (kind, weight, bytes), for 1 and 2 devices."""
    models = {
        kind: ModelProfile(kind, weights, 1, {size: table(size, weight) for size in (1, 2)})
        for kind, weight, weights in kinds
    }
    return Profile(MachineFacts("cuda", "made up", 2, 100_000), models, contention)


def load(name: str, rate: float, kind: str = "small", prompt: float = 200.0, output: float = 101.0) -> ModelLoad:
    return ModelLoad(name, kind, rate, prompt, output)


CLUSTER = Cluster(1, 2, 100_000)
