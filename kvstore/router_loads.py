"""What each router has on a unit, so that the others can count it when they choose a unit. Pure.

It reads the unit's leases and queued requests; it knows no stream and no time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kvstore.leases import LeaseRecord
from kvstore.unit import Unit
from muxmesh.step_cost import context_of


@dataclass(frozen=True, slots=True)
class Load:
    """Sequences of one model, queued or running, and the prompt tokens of them that are not computed, with the earlier
    tokens that these attend to, summed.
    """

    num_sequences: int = 0
    prefill_tokens: int = 0
    prefill_context: int = 0

    def plus(self, other: Load) -> Load:
        return Load(
            self.num_sequences + other.num_sequences,
            self.prefill_tokens + other.prefill_tokens,
            self.prefill_context + other.prefill_context,
        )


NO_LOAD = Load()
RouterLoads = Mapping[str, Mapping[str, Load]]
"""Model → router → load."""


def router_loads(unit: Unit) -> RouterLoads:
    """The loads of all routers. A router has no entry for a model of which it has nothing."""
    loads: dict[str, defaultdict[str, Load]] = {model: defaultdict(Load) for model in unit.models}
    for model, router, load in _sequences(unit):
        loads[model][router] = loads[model][router].plus(load)
    return loads


def load_of_others(loads: Mapping[str, Load], router: str) -> Load:
    """The load of all routers but ``router``, of one model. A router that has connected again is the same one."""
    total, own = NO_LOAD, incarnation(router)
    for name, load in loads.items():
        if incarnation(name) != own:
            total = total.plus(load)
    return total


def incarnation(router: str) -> str:
    """A router without the number of its connection, which kvstore adds to the name."""
    return router.rpartition("#")[0] or router


def _sequences(unit: Unit) -> Iterator[tuple[str, str, Load]]:
    for entry in unit.admission.entries():
        if entry.swapped is None:
            demand, block_size = entry.request.demand, unit.models[entry.model].shape.block_size
            num_cached = unit.blocks.count_cached(entry.model, demand.block_hashes) * block_size
            num_known = len(demand.block_hashes) * block_size
            yield entry.model, entry.source, _load(num_known, min(num_cached, demand.max_cached_tokens))
    for record in unit.leases.records():
        yield record.lease.model, record.router, _load_of_lease(record)


def _load_of_lease(record: LeaseRecord) -> Load:
    """A lease of a decode worker has no prompt to compute."""
    if record.owner == record.assignment.decode:
        return Load(1)
    return _load(len(record.block_hashes) * record.block_size, record.lease.num_computed_tokens)


def _load(num_known: int, num_computed: int) -> Load:
    """Prompts are counted in full blocks: kvstore knows no more of them."""
    num_left = max(0, num_known - num_computed)
    return Load(1, num_left, context_of(num_computed, num_left))
