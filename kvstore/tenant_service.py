"""How much service each tenant of a unit had, and how far it is ahead of the least served one. Pure.

The counters are those of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): a virtual token counter
(VTC) for each tenant, charged while its sequences run. Two things differ:

- **The unit of service** is a second of the whole device: for a prompt its part of full prefill steps, and for a
  sequence the seconds of its decode steps, divided by the slots of the batch that it shares. So a token of a large
  model costs more, and tokens of prompts and outputs cost what they cost the device.
- **Weights.** A tenant's counter is its service divided by its weight.

A tenant is active while it has queued requests or leases. One that becomes active is lifted to the least counter of the
active ones (the virtual time), so its absence gives it no credit; while none is active, to the highest counter so far.
What follows from the counters for the order of requests is in `kvstore.tenant_order`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

BEST_CLASS_HOLD_S = 5.0
"""The best class of a tenant's requests is its best one for this long after the last of them: otherwise all of its
others would change their rank with each of them that comes and goes."""
_Key = TypeVar("_Key")
_MAX_IDLE = 4096
"""Counters of tenants that are not active and were ahead of the active ones: so many are kept."""


@dataclass(frozen=True, slots=True)
class Payer:
    """Who is charged for a sequence. ``slot_share``: one slot of its model's batch as part of all of these slots."""

    tenant: str = ""
    model: str = ""
    weight: float = 1.0
    slot_share: float = 1.0


NO_PAYER = Payer()


@dataclass(frozen=True, slots=True)
class TenantUse:
    """What an active tenant uses. ``service_s``: seconds of the device since it became active. ``group``: bands of
    weighted service that it is ahead of the least served one.
    """

    service_s: float
    group: int
    num_queued: int
    num_running: int


@dataclass(slots=True)
class _Tenant:
    """An active tenant. ``counter_s``: service divided by weight, from the start of the unit's virtual time on.

    ``is_new``: it is not lifted yet.
    """

    counter_s: float
    weight: float
    is_new: bool = True
    service_s: float = 0.0
    num_queued: int = 0
    num_leases: int = 0
    sequences: Counter[str] = field(default_factory=Counter)
    """Model → queued requests and leases."""
    classes: Counter[int] = field(default_factory=Counter)
    """Priority class → queued requests and leases."""
    best_priority: int = 0
    best_seen_s: float = -math.inf
    """When the tenant had requests of that class last."""


class TenantService:
    """Owns the counters of the tenants of one unit.

    Invariant: the active tenants are those with queued requests or leases. No counter of an active tenant and not the
    virtual time ever decreases, and after `settle` no active tenant's counter is below the virtual time.
    """

    def __init__(self) -> None:
        self._active: dict[str, _Tenant] = {}
        self._idle: dict[str, float] = {}
        """Tenants that are not active → their counters, where these are above the virtual time."""
        self._virtual_s = 0.0
        self.churn = 0.0
        """Slots that sequences took or left since the last `settle`, as parts of their batches."""
        self.has_better_class = False
        """Whether a request of a better class than its tenant had at the last `settle` has come since."""

    @property
    def num_active(self) -> int:
        """Tenants with queued requests or leases."""
        return len(self._active)

    def queue(self, payer: Payer, priority: int) -> None:
        """A request is queued. Its slot share does not matter."""
        self._enter(payer, priority).num_queued += 1

    def unqueue(self, payer: Payer, priority: int) -> None:
        """A queued request has been admitted or withdrawn; a lease that it got has to be counted before."""
        self._active[payer.tenant].num_queued -= 1
        self._leave(payer, priority)

    def lease(self, payer: Payer, priority: int) -> None:
        """The tenant has one more lease."""
        self._enter(payer, priority).num_leases += 1
        self.churn += payer.slot_share

    def end_lease(self, payer: Payer, priority: int) -> None:
        """A lease has ended."""
        self._active[payer.tenant].num_leases -= 1
        self.churn += payer.slot_share
        self._leave(payer, priority)

    def charge_prefill(self, payer: Payer, prefill_s: float) -> None:
        """A prompt of the tenant was computed in ``prefill_s`` seconds of the device."""
        self._charge(payer.tenant, prefill_s)

    def charge_decode(self, payer: Payer, decode_s: float) -> None:
        """A sequence of the tenant was in decode steps of ``decode_s`` seconds."""
        self._charge(payer.tenant, decode_s * payer.slot_share)

    def count(self, tenant: str, model: str) -> int:
        """Queued requests and leases of a tenant for ``model``."""
        return found.sequences[model] if (found := self._active.get(tenant)) else 0

    def weight(self, tenant: str) -> float:
        """The weight of an active tenant: that of its latest request."""
        return self._active[tenant].weight

    def best_priority(self, tenant: str) -> int:
        """The best class of the requests of an active tenant, as of the last `settle`."""
        return self._active[tenant].best_priority

    def lead_s(self, tenant: str) -> float:
        """Seconds of weighted service that a tenant is ahead of the least served active one; 0 for one that is lifted.

        As of the last `settle`; of a tenant that has become active since, and of one that is not active, as if now.
        """
        found = self._active.get(tenant)
        counter_s = self._idle.get(tenant, 0.0) if found is None else found.counter_s
        return max(0.0, counter_s - self._virtual_s)

    def settle(self, now_s: float) -> None:
        """Advances the virtual time, lifts the tenants that have become active, and determines the best classes.

        What workers have reported until ``now_s`` (monotonic time) has to be charged before, or a tenant that has
        become active would be lifted to less than the others had.
        """
        known = [tenant.counter_s for tenant in self._active.values() if not tenant.is_new]
        self._virtual_s = max(self._virtual_s, min(known, default=0.0))
        for tenant in self._active.values():
            if tenant.is_new:
                tenant.counter_s, tenant.is_new = max(tenant.counter_s, self._virtual_s), False
            best = min(tenant.classes)
            if best <= tenant.best_priority or now_s - tenant.best_seen_s >= BEST_CLASS_HOLD_S:
                tenant.best_priority, tenant.best_seen_s = best, now_s
        self.churn, self.has_better_class = 0.0, False
        for name in [name for name, counter_s in self._idle.items() if counter_s <= self._virtual_s]:
            del self._idle[name]

    def use(self, band_s: float) -> Mapping[str, TenantUse]:
        """What each active tenant uses; ``band_s``: of which its group is a multiple."""
        return {
            name: TenantUse(tenant.service_s, int(self.lead_s(name) / band_s), tenant.num_queued, tenant.num_leases)
            for name, tenant in self._active.items()
        }

    def check_integrity(self) -> None:
        """Proves the invariant, as far as it is one of a moment. Raises AssertionError."""
        for name, tenant in self._active.items():
            assert tenant.num_queued >= 0 <= tenant.num_leases, f"tenant {name}: negative numbers of requests"
            assert tenant.num_queued + tenant.num_leases == tenant.classes.total() > 0, f"tenant {name}: wrong numbers"
            assert tenant.sequences.total() == tenant.classes.total(), f"tenant {name}: wrong numbers by model"
            assert tenant.is_new or tenant.counter_s >= self._virtual_s, f"tenant {name} was not lifted"
            assert name not in self._idle, f"tenant {name} is active and idle"

    def _charge(self, name: str, service_s: float) -> None:
        assert service_s >= 0, "service is never taken back"
        tenant = self._active[name]
        tenant.service_s += service_s
        tenant.counter_s += service_s / tenant.weight

    def _enter(self, payer: Payer, priority: int) -> _Tenant:
        tenant = self._active.get(payer.tenant)
        if tenant is None:
            is_alone = not self._active  # then the virtual time is exact, and need not be settled
            counter_s = max(self._idle.pop(payer.tenant, 0.0), self._virtual_s if is_alone else 0.0)
            tenant = _Tenant(counter_s, payer.weight, not is_alone, best_priority=priority)
            self._active[payer.tenant] = tenant
        tenant.weight = payer.weight
        self.has_better_class |= priority < tenant.best_priority
        tenant.classes[priority] += 1
        tenant.sequences[payer.model] += 1
        return tenant

    def _leave(self, payer: Payer, priority: int) -> None:
        tenant = self._active[payer.tenant]
        _remove(tenant.classes, priority)
        _remove(tenant.sequences, payer.model)
        if tenant.classes:
            return
        del self._active[payer.tenant]
        if not self._active:
            self._virtual_s = max(self._virtual_s, tenant.counter_s, *self._idle.values())
            self._idle.clear()
        elif tenant.counter_s > self._virtual_s:
            self._idle[payer.tenant] = tenant.counter_s
            if len(self._idle) > _MAX_IDLE:
                del self._idle[next(iter(self._idle))]


def _remove(counts: Counter[_Key], key: _Key) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
