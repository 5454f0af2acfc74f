"""Models with their load, clusters, and plans: which models share which devices. Values, without searching."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SHAREGPT_PROMPT_TOKENS = 161
"""Mean prompt length of ShareGPT in MuxServe's estimator. The default of models whose lengths are not given."""
SHAREGPT_OUTPUT_TOKENS = 337
"""Mean output length, likewise."""
DEFAULT_SLO_SCALE = 8.0
"""Scale by which the attainment of models without an SLO is estimated: that of MuxServe's evaluation."""


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """One model of a workload."""

    name: str
    kind: str
    """Its name in the profile; models of one kind have the same step times and sizes."""
    rate: float
    """Requests per second."""
    prompt_tokens: float
    """Mean length."""
    output_tokens: float
    """Mean length."""
    slo_scale: float = DEFAULT_SLO_SCALE
    """A request meets its objective if its latency is at most this multiple of that on an idle device."""
    slo_ttft_s: float | None = None
    """Instead of the scale: longest time to first token."""
    slo_tpot_s: float | None = None
    """Instead of the scale: longest mean time per output token."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Nodes with the same number of equal devices. A unit has 1, 2, 4, ... devices of one node."""

    num_nodes: int
    devices_per_node: int
    memory_bytes: int
    """Of one device."""
    worker_bytes: int = 0
    """Memory that each of a model's two workers needs on a device, beside weights and KV."""
    over_subscription: int = 20
    """Percent by which the decode shares of a unit may exceed 100."""

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.devices_per_node

    @property
    def unit_sizes(self) -> tuple[int, ...]:
        """Numbers of devices that a unit may have, ascending: powers of two up to a node."""
        return tuple(1 << power for power in range(self.devices_per_node.bit_length()))

    @property
    def max_share(self) -> int:
        """Limit on the sum of a unit's decode shares, in percent."""
        return 100 + self.over_subscription

    def first_fit(self, sizes: Iterable[int]) -> list[tuple[int, int]] | None:
        """(node, first device) of units of these sizes, in their order; None if they do not fit.

        Each is on the first node with enough free devices. Exact for powers of two that descend, which leave no gaps.
        """
        free = [self.devices_per_node] * self.num_nodes
        found = []
        for size in sizes:
            node = next((one for one, left in enumerate(free) if left >= size), None)
            if node is None:
                return None
            found.append((node, self.devices_per_node - free[node]))
            free[node] -= size
        return found


@dataclass(frozen=True, slots=True)
class PlacedModel:
    """A model in a unit. Shares are in percent."""

    load: ModelLoad
    prefill_share: int
    decode_share: int
    max_num_seqs: int


@dataclass(frozen=True, slots=True)
class PlacedUnit:
    """Models on ``num_devices`` devices, each of which holds a part of every model."""

    num_devices: int
    models: tuple[PlacedModel, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """All units."""

    units: tuple[PlacedUnit, ...]

    @property
    def num_devices(self) -> int:
        return sum(unit.num_devices for unit in self.units)


def place_text(num_devices: int, others: Iterable[str]) -> str:
    """Where a model is, for people: like `2 devices with chat, code`, of its unit's devices and other models."""
    names = ", ".join(others)
    return f"{num_devices} device{'s' if num_devices > 1 else ''} {'with ' + names if names else 'alone'}"


def weighted_mean(throughputs: Sequence[tuple[ModelLoad, float]]) -> float:
    """The mean throughput of models in requests per second, weighted by their rates, as MuxServe reports it."""
    total = sum(load.rate for load, _ in throughputs)
    return sum(load.rate * throughput for load, throughput in throughputs) / total
