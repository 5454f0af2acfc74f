"""How much service each tenant had, and which tenants precede others for it. Pure; time is an argument.

The rule is that of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): a virtual token counter (VTC)
for each tenant, and the tenant with the lowest counter goes first. Four things differ:

- **The unit of service** is a second of the whole device: the seconds of a prefill, and the seconds of a sequence's
  decode steps divided by the slots of the batch that it shares. So an output token costs more of a model with large
  steps, and long prompts are not cheaper than they are.
- **A band.** Tenants that are less than ``band_s`` ahead of the least served one compete with it by class and policy,
  otherwise the shortest request would never go first. Further ahead, ``k = floor(lead / band_s)`` is the tenant's group,
  and a lower group precedes. A group ends only half a band below the lead at which it began, so that it does not flap.
- **The service to come counts** (`HORIZON_BANDS`): the lead is the one that would result if every sequence of now kept
  its slot for that long. Without it a tenant whose requests fill the batch would have had hardly any service yet when
  another one comes; and long sequences would take all slots by the time they are charged for them.
- **Weights.** A tenant's counter is its service divided by its weight.

A tenant is active while it has queued requests or leases. One that becomes active is lifted to the least counter of the
active ones, so its absence gives it no credit. If none is active, to the highest counter that there was.

    level = counter + horizon * (slots in use / slots of a batch, summed over its sequences) / weight
    lead  = level - the least level of an active tenant
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from muxmesh.fairness import Fairness
from muxmesh.types import SOLE_TENANT, TenantStanding

HORIZON_BANDS = 4.0
"""Length of the service to come that counts, in bands: tenants whose parts of the slots differ by a quarter are a band
apart."""
UPDATE_EVERY_S = 0.1
"""Groups are determined again this often, besides when a tenant becomes active."""
BEST_CLASS_HOLD_S = 5.0
"""The best class of a tenant's requests is its best one for this long after the last of them: otherwise all of its
others would change their rank with each of them that comes and goes."""
_HYSTERESIS = 0.5
"""In bands: a group ends when the lead is this much below the one at which it began."""
_MAX_GROUP = 2**16
_MAX_IDLE = 4096
"""Counters of tenants that are not active and were ahead of the active ones: so many are kept."""


@dataclass(frozen=True, slots=True)
class Payer:
    """Who is charged for a sequence. ``slot_share``: one slot of its batch as part of all slots of that batch."""

    tenant: str = ""
    weight: float = 1.0
    slot_share: float = 1.0


@dataclass(frozen=True, slots=True)
class TenantUse:
    """What a tenant of a unit uses: seconds of the device since it became active, its group, and its requests."""

    service_s: float
    group: int
    num_queued: int
    num_running: int


@dataclass(slots=True)
class _Tenant:
    """An active tenant. ``counter_s``: service divided by weight, from the start of the unit's virtual time on."""

    counter_s: float
    weight: float
    is_new: bool = True
    """It is not lifted yet."""
    service_s: float = 0.0
    running_share: float = 0.0
    """Slots that its sequences use, each as part of its batch."""
    num_queued: int = 0
    num_leases: int = 0
    classes: Counter[int] = field(default_factory=Counter)
    """Priority class → queued requests and leases."""
    group: int = 0
    best_priority: int = 0
    best_seen_s: float = -math.inf
    """When the tenant had requests of that class last."""

    def level_s(self, horizon_s: float) -> float:
        return self.counter_s + horizon_s * self.running_share / self.weight


class TenantService:
    """Owns the counters of the tenants of one unit and their groups.

    Invariant: the tenants in ``_active`` are those with queued requests or leases. No counter and not the virtual time
    ever decreases, and after `update` no active tenant's counter is below the virtual time.
    """

    def __init__(self, fairness: Fairness | None = None) -> None:
        """``fairness`` None: all tenants are taken as one."""
        self._fairness = fairness
        self._band_s = fairness.band_s if fairness else math.inf
        self._horizon_s = HORIZON_BANDS * fairness.band_s if fairness else 0.0
        self._active: dict[str, _Tenant] = {}
        self._idle: dict[str, float] = {}
        """Tenants that are not active → their counters, where these are above the virtual time."""
        self._virtual_s = 0.0
        """The least counter of the active tenants, or the highest of all while none is active."""
        self._has_new = False
        self._classes_changed = False
        self._updated_at_s = -math.inf
        self._standings: dict[str, TenantStanding] = {}
        """Of the active tenants, as of the last `update`; empty while there is one at most."""

    @property
    def has_rivals(self) -> bool:
        """Whether requests of several tenants competed at the last `update`."""
        return bool(self._standings)

    def queue(self, tenant: str, weight: float, priority: int) -> None:
        """A request of ``tenant`` is queued."""
        self._enter(tenant, weight, priority).num_queued += 1

    def unqueue(self, tenant: str, priority: int) -> None:
        """A queued request has been admitted or withdrawn; a lease that it got has to be counted before."""
        self._active[tenant].num_queued -= 1
        self._leave(tenant, priority)

    def lease(self, payer: Payer, priority: int) -> None:
        """The tenant has one more lease."""
        self._enter(payer.tenant, payer.weight, priority).num_leases += 1

    def end_lease(self, payer: Payer, priority: int) -> None:
        """A lease, which uses no slot any more, has ended."""
        self._active[payer.tenant].num_leases -= 1
        self._leave(payer.tenant, priority)

    def use_slots(self, payer: Payer, number: int) -> None:
        """A lease of the tenant begins to use a slot (1), or uses it no longer (-1)."""
        self._active[payer.tenant].running_share += number * payer.slot_share

    def charge(self, payer: Payer, prefill_s: float, decode_s: float) -> None:
        """A sequence had ``prefill_s`` seconds of prefill and ``decode_s`` of decode steps; negative is taken as 0."""
        tenant = self._active[payer.tenant]
        service_s = max(0.0, prefill_s) + max(0.0, decode_s) * payer.slot_share
        tenant.service_s += service_s
        tenant.counter_s += service_s / tenant.weight

    def standing(self, tenant: str) -> TenantStanding:
        """Where a tenant stands since the last `update`."""
        return self._standings.get(tenant, SOLE_TENANT)

    def update(self, now_s: float) -> bool:
        """Determines the groups, if it is time to; returns whether the standing of an active tenant has changed.

        ``now_s``: monotonic time. What workers have reported until now has to be charged before, since a tenant that
        has become active is lifted here.
        """
        if self._fairness is None or (len(self._active) < 2 and not self._standings):
            self._settle()
            return False
        is_due = self._has_new or self._classes_changed or now_s - self._updated_at_s >= UPDATE_EVERY_S
        if not is_due:
            return False
        self._updated_at_s = now_s
        self._settle()
        before, self._standings = self._standings, {}
        if len(self._active) > 1:
            least_s = min(tenant.level_s(self._horizon_s) for tenant in self._active.values())
            for name, tenant in self._active.items():
                self._regroup(tenant, least_s)
                self._note_classes(tenant, now_s)
                self._standings[name] = self._same_or_new(before.get(name), tenant)
        else:
            for tenant in self._active.values():
                tenant.group = 0
        return before != self._standings

    def use(self) -> Mapping[str, TenantUse]:
        """What each active tenant uses."""
        return {
            name: TenantUse(tenant.service_s, tenant.group, tenant.num_queued, tenant.num_leases)
            for name, tenant in self._active.items()
        }

    def check_integrity(self) -> None:
        """Proves the invariant, as far as it is one of a moment. Raises AssertionError."""
        for name, tenant in self._active.items():
            assert tenant.num_queued >= 0 <= tenant.num_leases, f"tenant {name}: negative numbers of requests"
            assert tenant.num_queued + tenant.num_leases == tenant.classes.total() > 0, f"tenant {name}: wrong numbers"
            assert tenant.running_share > -1e-6, f"tenant {name} uses a negative number of slots"
            assert tenant.is_new or tenant.counter_s >= self._virtual_s - 1e-9, f"tenant {name} was not lifted"
            assert name not in self._idle, f"tenant {name} is active and idle"

    def _enter(self, name: str, weight: float, priority: int) -> _Tenant:
        tenant = self._active.get(name)
        if tenant is None:
            tenant = self._active[name] = _Tenant(self._idle.pop(name, 0.0), weight)
            self._has_new = True
        tenant.weight = weight
        if not tenant.classes[priority] and priority < tenant.best_priority:
            self._classes_changed = True
        tenant.classes[priority] += 1
        return tenant

    def _leave(self, name: str, priority: int) -> None:
        tenant = self._active[name]
        tenant.classes[priority] -= 1
        if tenant.classes[priority]:
            return
        del tenant.classes[priority]
        if tenant.classes:
            return
        del self._active[name]
        if not self._active:
            self._virtual_s = max(self._virtual_s, tenant.counter_s, *self._idle.values())
            self._idle.clear()
        elif tenant.counter_s > self._virtual_s:
            self._idle[name] = tenant.counter_s
            if len(self._idle) > _MAX_IDLE:
                del self._idle[next(iter(self._idle))]

    def _settle(self) -> None:
        """Advances the virtual time and lifts the tenants that have become active."""
        known = [tenant.counter_s for tenant in self._active.values() if not tenant.is_new]
        self._virtual_s = max(self._virtual_s, min(known, default=0.0))
        if self._has_new:
            for tenant in self._active.values():
                tenant.counter_s, tenant.is_new = max(tenant.counter_s, self._virtual_s), False
        self._has_new = self._classes_changed = False
        for name in [name for name, counter_s in self._idle.items() if counter_s <= self._virtual_s]:
            del self._idle[name]

    def _regroup(self, tenant: _Tenant, least_s: float) -> None:
        lead = (tenant.level_s(self._horizon_s) - least_s) / self._band_s
        if lead >= tenant.group + 1 or lead < tenant.group - _HYSTERESIS:
            tenant.group = min(int(lead), _MAX_GROUP)

    @staticmethod
    def _note_classes(tenant: _Tenant, now_s: float) -> None:
        best = min(tenant.classes)
        if best <= tenant.best_priority or now_s - tenant.best_seen_s >= BEST_CLASS_HOLD_S:
            tenant.best_priority, tenant.best_seen_s = best, now_s

    @staticmethod
    def _same_or_new(before: TenantStanding | None, tenant: _Tenant) -> TenantStanding:
        if before is not None and (before.group, before.best_priority) == (tenant.group, tenant.best_priority):
            return before
        return TenantStanding(tenant.group, tenant.best_priority, has_rivals=True, has_overdue_lane=False)
