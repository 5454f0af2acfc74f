"""Keeps the standing of tenants in the states of their queued requests and leases. Pure; time is an argument.

`kvstore.tenant_service` determines how far each tenant is ahead, `kvstore.overdue_lane` which overdue requests precede
all others. This module writes both into the scheduling states by which admission, memory and workers order requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from kvstore.admission import Admission, AdmissionEntry
from kvstore.leases import LeaseRecord, LeaseTable
from kvstore.overdue_lane import OverdueRequest, lane_capacity, lane_members
from kvstore.tenant_service import UPDATE_EVERY_S, TenantService
from kvstore.wait_times import EntryKey
from muxmesh.fairness import Fairness
from muxmesh.scheduling_policy import SchedulingPolicy
from muxmesh.types import TenantStanding

_LaneKey = EntryKey | int
"""Of a queued request, or the id of a lease, swapped ones included."""


class TenantOrder:
    """Owns the overdue lane of a unit.

    Invariant: after `update`, the state of each entry and lease has the standing of its tenant, as of the latest update
    of `TenantService`.
    """

    def __init__(
        self,
        service: TenantService,
        admission: Admission,
        leases: LeaseTable,
        policy: SchedulingPolicy,
        fairness: Fairness | None,
        num_slots: Callable[[], Mapping[str, int]],
    ) -> None:
        """``num_slots``: of the ready decode workers, by model."""
        self._service, self._admission, self._leases, self._policy = service, admission, leases, policy
        self._lane_share = fairness.overdue_share if fairness else 1.0
        self._num_slots = num_slots
        self._lane: set[_LaneKey] = set()
        self._lane_due_s = -math.inf

    def update(self, now_s: float, unix_s: float) -> None:
        """To be called before each admission. ``now_s`` is monotonic time, ``unix_s`` the same moment in unix time."""
        has_changed = self._service.update(now_s)
        lane: set[_LaneKey] = set()
        if self._service.has_rivals and self._policy.max_wait_s < math.inf:
            lane = self._lane
            if has_changed or now_s >= self._lane_due_s:
                self._lane_due_s = now_s + UPDATE_EVERY_S
                lane = self._lane_members(unix_s)
        if has_changed or lane != self._lane:
            self._lane = lane
            self._admission.set_standings(self._standing_of_entry)
            self._leases.set_standings(self._standing_of_lease)

    def next_change_s(self) -> float | None:
        """Monotonic time at which `update` has something to do although nothing has happened; None: at no time."""
        is_lane_used = self._service.has_rivals and self._policy.max_wait_s < math.inf and self._admission.waiting
        return self._lane_due_s if is_lane_used else None

    def _lane_members(self, unix_s: float) -> set[_LaneKey]:
        overdue: dict[str, list[OverdueRequest[_LaneKey]]] = {}
        for record in self._leases.records():
            if self._policy.is_overdue(record.scheduling, unix_s):
                key, arrived_at_s = record.lease.ref.lease_id, record.scheduling.arrived_at_s
                request = OverdueRequest[_LaneKey](record.payer.tenant, arrived_at_s, key)
                overdue.setdefault(record.lease.model, []).append(request)
        for entry in self._admission.entries:
            if entry.swapped is None and self._policy.is_overdue(entry.request.scheduling, unix_s):
                arrived_at_s = entry.request.scheduling.arrived_at_s
                request = OverdueRequest[_LaneKey](entry.request.tenant, arrived_at_s, entry.key)
                overdue.setdefault(entry.model, []).append(request)
        num_slots = self._num_slots() if overdue else {}
        members: set[_LaneKey] = set()
        for model, requests in overdue.items():
            members |= lane_members(requests, lane_capacity(self._lane_share, num_slots.get(model, 0)))
        return members

    def _standing_of_entry(self, entry: AdmissionEntry) -> TenantStanding:
        return self._standing(entry.request.tenant, entry.swapped.lease_id if entry.swapped else entry.key)

    def _standing_of_lease(self, record: LeaseRecord) -> TenantStanding:
        return self._standing(record.payer.tenant, record.lease.ref.lease_id)

    def _standing(self, tenant: str, key: _LaneKey) -> TenantStanding:
        standing = self._service.standing(tenant)
        return replace(standing, has_overdue_lane=True) if key in self._lane else standing
