"""Which sequence gives its token blocks to another one. Pure.

It is the last one in the order of requests, of those that no batch has before those of a batch: it waits longest
anyway. A lease is chosen again until its token blocks are freed, but at most `MAX_PREEMPTION_REQUESTS` times, since its
worker may wait for a client that does not read its stream.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from kvstore.leases import LeaseRecord, LeaseState
from muxmesh.scheduling_policy import SortKey
from muxmesh.types import SchedulingState

MAX_PREEMPTION_REQUESTS = 20
"""See the head of this module."""

Order = Callable[[SchedulingState], SortKey]


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


def last_after(records: Iterable[LeaseRecord], order: Order, after: SortKey, takes_batched: bool) -> Victim | None:
    """As `last_in_order`, but only of sequences whose key is above ``after``; those of a batch if ``takes_batched``.

    One that is being freed is chosen before any other, and is not new.
    """
    states = [LeaseState.PAUSED, LeaseState.RESIDENT] if takes_batched else [LeaseState.PAUSED]
    following = [record for record in _preemptible(records) if order(record.scheduling) > after]
    leaving = (*states, LeaseState.SWAPPING_OUT)
    requested = next((one for one in following if one.num_preemption_requests and one.state in leaving), None)
    return Victim(requested, is_new=False) if requested is not None else _last(following, states, order)


def _preemptible(records: Iterable[LeaseRecord]) -> list[LeaseRecord]:
    return [record for record in records if record.num_preemption_requests < MAX_PREEMPTION_REQUESTS]


def _last(records: Iterable[LeaseRecord], states: Collection[LeaseState], order: Order) -> Victim | None:
    last = max(
        (record for record in records if record.state in states),
        key=lambda record: (record.state is LeaseState.PAUSED, order(record.scheduling)),
        default=None,
    )
    return None if last is None else Victim(last, is_new=True)
