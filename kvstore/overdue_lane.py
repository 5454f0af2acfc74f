"""Which overdue requests precede all others while several tenants compete. Pure.

A request that has waited for `max_wait_s` precedes those that have not, better classes included. Without a limit a
tenant that queues enough requests would take all slots in that way once they are overdue. So the lane has room for a
part of a model's slots. Tenants take turns in it: first the oldest request of each tenant, then the second oldest. An
overdue request that is not in the lane has the position that it would have if it were not overdue.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

_Key = TypeVar("_Key")


@dataclass(frozen=True, slots=True)
class OverdueRequest(Generic[_Key]):
    """An overdue request, queued or running. ``arrived_at_s``: unix time. ``key``: what the caller knows it by."""

    tenant: str
    arrived_at_s: float
    key: _Key


def lane_capacity(share: float, num_slots: int) -> int:
    """Requests that the lane has room for: ``share`` of the slots of a model, and at least one."""
    return max(1, int(share * num_slots))


def lane_members(overdue: Iterable[OverdueRequest[_Key]], capacity: int) -> set[_Key]:
    """The keys of the requests in the lane, at most ``capacity``."""
    by_tenant: defaultdict[str, list[OverdueRequest[_Key]]] = defaultdict(list)
    for request in sorted(overdue, key=lambda one: one.arrived_at_s):
        by_tenant[request.tenant].append(request)
    in_turn = [(turn, one.arrived_at_s, one) for of_tenant in by_tenant.values() for turn, one in enumerate(of_tenant)]
    return {one.key for _, _, one in sorted(in_turn, key=lambda item: item[:2])[:capacity]}
