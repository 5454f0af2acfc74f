"""Which sequence gives its token blocks to another one. Pure.

It is the last one in the order of requests, of those that no batch has before those of a batch: it waits longest
anyway. Of equal ones, such as the outputs of one request, the lease that was issued later is later. Without that, two
that fill the pool would pre-empt themselves in turn.

A lease is chosen again until its token blocks are freed, but at most `MAX_PREEMPTION_REQUESTS` times, since its worker
may wait for a client that does not read its stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from kvstore.leases import LeaseRecord, LeaseState
from muxmesh.scheduling_policy import SortKey
from muxmesh.types import SchedulingState

MAX_PREEMPTION_REQUESTS = 20
"""See the head of this module."""

Order = Callable[[SchedulingState], SortKey]
NO_LEASE = math.inf
"""Instead of the id of a lease: later than all leases of equal order."""
LeaseOrder = tuple[SortKey, float]
"""Sort key, id of the lease. No two leases have the same."""


@dataclass(frozen=True, slots=True)
class Victim:
    """A sequence to pre-empt. ``is_new``: it was not chosen before."""

    record: LeaseRecord
    is_new: bool


def last_in_order(records: Iterable[LeaseRecord], order: Order) -> Victim | None:
    """The victim among ``records``, of any owner and model; None if none of them can be pre-empted."""
    candidates = _preemptible(records)
    requested = next((record for record in candidates if record.num_preemption_requests), None)
    if requested is not None:
        return Victim(requested, is_new=False)
    return _last(candidates, (LeaseState.PAUSED, LeaseState.RESIDENT), order)


def last_after(records: Iterable[LeaseRecord], order: Order, after: LeaseOrder, takes_batched: bool) -> Victim | None:
    """As `last_in_order`, but only of sequences that follow ``after``; those of a batch if ``takes_batched``.

    One that is being freed is chosen before any other, and is not new.
    """
    states = [LeaseState.PAUSED, LeaseState.RESIDENT] if takes_batched else [LeaseState.PAUSED]
    following = [record for record in _preemptible(records) if lease_order(record, order) > after]
    leaving = (*states, LeaseState.SWAPPING_OUT)
    requested = next((one for one in following if one.num_preemption_requests and one.state in leaving), None)
    return Victim(requested, is_new=False) if requested is not None else _last(following, states, order)


def lease_order(record: LeaseRecord, order: Order) -> LeaseOrder:
    """The position of a lease."""
    return order(record.scheduling), record.lease.ref.lease_id


def _preemptible(records: Iterable[LeaseRecord]) -> list[LeaseRecord]:
    return [record for record in records if record.num_preemption_requests < MAX_PREEMPTION_REQUESTS]


def _last(records: Iterable[LeaseRecord], states: Collection[LeaseState], order: Order) -> Victim | None:
    last = max(
        (record for record in records if record.state in states),
        key=lambda record: (record.state is LeaseState.PAUSED, lease_order(record, order)),
        default=None,
    )
    return None if last is None else Victim(last, is_new=True)
