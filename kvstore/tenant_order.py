"""Turns the service of tenants into the order of their requests. Pure; time is an argument.

While several tenants have requests, those of each tenant and model are numbered in the tenant's own order, running ones
included: by class, then by policy. The k-th of them, from 0 on, has

    lead  = seconds of service that its tenant is ahead of the least served one (`kvstore.tenant_service`)
    level = lead / band_s + HORIZON_BANDS * k / (slots of a batch * weight)
    group = floor(level)

and a lower group precedes (`SchedulingState.precedence`). The first one of a tenant that has no slot but for this one
is a band lower. Within a group, class and policy decide between tenants too, otherwise the shortest request would never
go first. So

- tenants with equal service have equal groups, and divide the slots by their weights, give or take the quarter of a
  batch that is a band;
- a tenant that is a band ahead gets a quarter fewer slots than one that is not, four bands ahead at most one;
- a tenant that is less than a band ahead has a slot as soon as it has a request, however many others have.

The level counts what a sequence that keeps its slot will have been served, as VTC with length prediction does, but from
slots instead of lengths. By the counters alone a tenant could take all slots before it is charged for them, and then
lose all of them at once. A group that was determined once ends half a band below the level at which it began.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache

from kvstore.admission import Admission, AdmissionEntry
from kvstore.leases import LeaseTable
from kvstore.overdue_lane import OverdueRequest, lane_capacity, lane_members
from kvstore.tenant_service import TenantService
from kvstore.wait_times import EntryKey
from muxmesh.fairness import Fairness
from muxmesh.scheduling_policy import SchedulingPolicy
from muxmesh.types import SOLE_TENANT, QueuedRequest, SchedulingState, TenantStanding

HORIZON_BANDS = 4.0
"""Levels that the slots of one batch make up: a quarter of them is a band."""
UPDATE_EVERY_S = 0.1
"""Groups are determined again this often, and before that when many sequences have come or gone."""
_MAX_CHURN = 1 / 8
"""Of the slots of a batch: if so many were taken or left, groups are determined again."""
_MANY_SEQUENCES, _MANY_EVERY_S = 512, 0.02
"""With more queued requests and leases, groups are determined again at most this often for that reason."""
_HYSTERESIS = 0.5
"""In bands."""
_MAX_GROUP = 2**16

_Key = EntryKey | int
"""Of a queued request, or the id of a lease, swapped ones included."""
_Sequence = tuple[_Key, SchedulingState, float]
"""With its score by the policy."""


def group_of(lead_bands: float, part: float, is_only: bool, before: int | None = None) -> int:
    """The group of a sequence, see the head of this module. ``before``: the group that it has; None: it is new.

    ``part``: the slots of the sequences before it, divided by those of a batch and the tenant's weight. ``is_only``: it
    is the first one of a tenant that has no slot but for this one.
    """
    level = lead_bands + HORIZON_BANDS * part - is_only
    if before is not None and before - _HYSTERESIS <= level < before + 1:
        return before
    return math.floor(min(level, _MAX_GROUP))


class TenantOrder:
    """Owns when the standings of the queued requests and leases of a unit are determined again.

    Invariant: while at most one tenant is active, `update` leaves all states as they would be without tenants.
    """

    def __init__(
        self,
        service: TenantService,
        admission: Admission,
        leases: LeaseTable,
        policy: SchedulingPolicy,
        fairness: Fairness | None,
        num_slots: Callable[[], Mapping[str, int]],
        max_num_seqs: Callable[[str], int],
    ) -> None:
        """``num_slots``: of the ready decode workers, by model. ``max_num_seqs``: slots of a batch of a model.

        ``fairness`` None: tenants are not told apart.
        """
        self._service, self._admission, self._leases, self._policy = service, admission, leases, policy
        self._fairness, self._num_slots, self._max_num_seqs = fairness, num_slots, max_num_seqs
        self._has_rivals = False
        self._updated_at_s = -math.inf
        self._numbers: dict[str, int] = {}
        """Active tenant → `TenantStanding.tenant_number`."""
        self._last_number = 0

    def update(self, now_s: float, unix_s: float) -> None:
        """To be called before each admission. ``now_s`` is monotonic time, ``unix_s`` the same moment in unix time."""
        service = self._service
        if self._fairness is None or (service.num_active < 2 and not self._has_rivals):
            return
        if self._has_rivals and now_s - self._updated_at_s < self._interval_s():
            return
        self._updated_at_s = now_s
        service.settle(now_s)
        self._has_rivals = service.num_active > 1
        standings = self._determine(self._fairness, unix_s) if self._has_rivals else {}
        self._admission.set_standings(lambda entry: standings.get(_entry_key(entry), SOLE_TENANT))
        self._leases.set_standings(lambda record: standings.get(record.lease.ref.lease_id, SOLE_TENANT))

    def _interval_s(self) -> float:
        """Seconds between two updates, as things have changed since the last one."""
        service = self._service
        if service.churn < _MAX_CHURN and not service.has_better_class:
            return UPDATE_EVERY_S
        return _MANY_EVERY_S if len(self._leases) + len(self._admission.waiting) > _MANY_SEQUENCES else 0.0

    def with_standing(self, request: QueuedRequest) -> QueuedRequest:
        """A request that is about to be queued, in the last position of its tenant until the next `update`."""
        standing, tenant = SOLE_TENANT, request.tenant
        if self._has_rivals and self._fairness is not None:
            position, lead = self._service.count(tenant, request.model), self._service.lead_s(tenant)
            part = position / (self._max_num_seqs(request.model) * request.tenant_weight)
            group = group_of(lead / self._fairness.band_s, part, is_only=position == 0)
            standing = _standing(group, request.scheduling.priority, False, self._number_of(tenant))
        if request.scheduling.standing == standing:
            return request
        return replace(request, scheduling=request.scheduling.with_standing(standing))

    def _determine(self, fairness: Fairness, unix_s: float) -> dict[_Key, TenantStanding]:
        """The standing of each queued request and lease."""
        service, sequences = self._service, self._sequences(unix_s)
        self._numbers = {tenant: self._number_of(tenant) for tenant, _ in sequences}
        lane = self._lane(sequences, fairness, unix_s)
        standings: dict[_Key, TenantStanding] = {}
        for (tenant, model), of_tenant in sequences.items():
            lead, best, number = (
                service.lead_s(tenant) / fairness.band_s,
                service.best_priority(tenant),
                self._numbers[tenant],
            )
            part_of_one = 1 / (self._max_num_seqs(model) * service.weight(tenant))
            has_several = sum(isinstance(key, int) and self._is_batched(key) for key, *_ in of_tenant) > 1
            in_order = sorted(
                (key not in lane, state.priority, score, state.arrived_at_s, index)
                for index, (key, state, score) in enumerate(of_tenant)
            )
            for position, (*_, index) in enumerate(in_order):
                key, state, _ = of_tenant[index]
                before = state.standing.group if state.standing.has_rivals else None
                group = group_of(lead, position * part_of_one, position == 0 and not has_several, before)
                standings[key] = _standing(group, best, key in lane, number)
        return standings

    def _sequences(self, unix_s: float) -> dict[tuple[str, str], list[_Sequence]]:
        """The queued requests and leases of each tenant and model."""
        found: dict[tuple[str, str], list[_Sequence]] = {}
        for record in self._leases.records():
            payer = record.payer
            lease_id, state = record.lease.ref.lease_id, record.scheduling
            sequence = (lease_id, state, self._policy.score(state, unix_s))
            found.setdefault((payer.tenant, payer.model), []).append(sequence)
        for entry, score in self._admission.with_scores(unix_s):
            if entry.swapped is None:
                request = entry.request
                found.setdefault((request.tenant, request.model), []).append((entry.key, request.scheduling, score))
        return found

    def _is_batched(self, lease_id: int) -> bool:
        record = self._leases.find(lease_id)
        return record is not None and record.is_batched

    def _lane(
        self, sequences: Mapping[tuple[str, str], list[_Sequence]], fairness: Fairness, unix_s: float
    ) -> set[_Key]:
        """The sequences in the overdue lanes of all models."""
        if self._policy.max_wait_s == math.inf:
            return set()
        overdue: dict[str, list[OverdueRequest[_Key]]] = {}
        for (tenant, model), of_tenant in sequences.items():
            for key, state, _ in of_tenant:
                if self._policy.is_overdue(state, unix_s):
                    overdue.setdefault(model, []).append(OverdueRequest(tenant, state.arrived_at_s, key))
        members: set[_Key] = set()
        num_slots = self._num_slots() if overdue else {}
        for model, requests in overdue.items():
            members |= lane_members(requests, lane_capacity(fairness.overdue_share, num_slots.get(model, 0)))
        return members

    def _number_of(self, tenant: str) -> int:
        """The number of a tenant, a new one if it has none."""
        number = self._numbers.get(tenant)
        if number is None:
            self._last_number += 1
            number = self._numbers[tenant] = self._last_number
        return number


@lru_cache(maxsize=4096)
def _standing(group: int, best_priority: int, has_overdue_lane: bool, tenant_number: int) -> TenantStanding:
    """Equal standings are one object, which the states of many sequences share."""
    return TenantStanding(group, best_priority, True, has_overdue_lane, tenant_number)


def _entry_key(entry: AdmissionEntry) -> _Key:
    return entry.swapped.lease_id if entry.swapped else entry.key
