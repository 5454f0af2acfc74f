"""Reserves the quota of each request before it is queued, and settles it when the request has ended, in whatever way.

The quotas are in Redis (`muxmesh.tenants.quota_book`). While it is away, this router grants its part of them by itself
(`router.local_quotas`), or refuses; requests that ended meanwhile are settled when it returns, and those that still run
are reserved again. Both are idempotent, so nothing is charged twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol

from muxmesh.clock import Clock
from muxmesh.errors import QuotaExceeded, Unavailable
from muxmesh.tenants.quota_book import Left, Renewal, Used
from muxmesh.tenants.tenant import Tenant
from router import ahead_reservations
from router.ahead_reservations import AheadReservations
from router.local_quotas import LocalQuotas
from router.reservation import Reservation
from router.reservation_stock import Spare
from router.tenant_batches import send_by_tenant

_log = logging.getLogger(__name__)

RENEW_EVERY_S = 10.0
"""A third of the time after which reservations that are not renewed are given back."""
RETRY_S = 1.0
RESERVE_TIMEOUT_S = 0.5
"""How long a request waits for Redis; then this router treats Redis as away."""
_MAX_SETTLING = 256
"""Settlements that are sent together, of all tenants."""
SETTLE_AFTER_S = 0.05
"""Settlements of this time are sent together."""
MAX_UNSETTLED = 200_000
"""Settlements that wait for Redis. Beyond it the oldest ones are added up to one for each tenant."""

OnRedisLoss = Literal["open", "closed"]


class Book(ahead_reservations.Book, Protocol):
    """See `QuotaBook`."""

    async def reserve(self, tenant: Tenant, owner: str, reservation_id: str, num_tokens: int) -> Left: ...
    async def settle(self, tenant: Tenant, used_of: Mapping[str, Used]) -> None: ...
    async def renew(self, tenant: Tenant, owner: str, next_number: int, tokens_of: Mapping[str, int]) -> Renewal: ...


@dataclass(frozen=True, slots=True)
class _Settlement:
    tenant: Tenant
    reservation_id: str
    used: Used


class QuotaKeeper:
    """Owns the open reservations of this router, and the settlements that Redis does not know yet.

    Invariant: a reservation is open until it has ended, then a settlement until Redis has confirmed it.
    """

    def __init__(self, book: Book, owner: str, on_redis_loss: OnRedisLoss, clock: Clock) -> None:
        """``owner``: this incarnation of this router, unique in the mesh."""
        self._book, self._owner, self._clock = book, owner, clock
        self._on_redis_loss: OnRedisLoss = on_redis_loss
        self._local = LocalQuotas()
        self._ahead = AheadReservations(book, owner, self, clock)
        self._last_number = 0
        self._open: defaultdict[str, dict[str, Reservation]] = defaultdict(dict)
        """Tenant id → reservation id → reservation."""
        self._tenants: dict[str, Tenant] = {}
        """By id, with the limits of the last request: Redis is never told earlier ones again."""
        self._unsettled: deque[_Settlement] = deque()
        self._work = asyncio.Event()
        self._num_routers: dict[str, int] = {}
        """Tenant id → routers that had reservations of it at the last renewal."""
        self.is_away = False
        """Whether Redis did not respond when it was called last."""
        self.num_refused: Counter[tuple[str, str]] = Counter()
        """Tenant name, limit → requests that this router refused."""
        self.num_local = 0
        """Requests granted without Redis."""

    @property
    def num_open(self) -> int:
        """Reservations of requests that have not ended."""
        return sum(map(len, self._open.values()))

    @property
    def num_unsettled(self) -> int:
        """Settlements that Redis has not confirmed."""
        return len(self._unsettled)

    async def reserve(self, tenant: Tenant, num_tokens: int) -> Reservation:
        """Reserves one request of ``num_tokens``, prompt and expected output: one that was made ahead, or a new one.

        Raises QuotaExceeded, or Unavailable while Redis is away if that is to refuse requests.
        """
        self._tenants[tenant.tenant_id] = tenant
        opened = self._open[tenant.tenant_id]
        num_open, ahead = len(opened), self._ahead.take(tenant, num_tokens)
        one = ahead or self.new_reservation(tenant, num_tokens)
        one.started_at_s = self._clock.monotonic_s()
        opened[one.reservation_id] = one
        if ahead is None:
            await self._ask(one, num_open, one.started_at_s)
        return one

    def new_reservation(self, tenant: Tenant, num_tokens: int) -> Reservation:
        """One that Redis knows nothing of."""
        self._last_number += 1
        reservation_id = f"{self._owner}-{self._last_number}"
        return Reservation(self, tenant, reservation_id, self._last_number, num_tokens, self._clock.monotonic_s())

    def newest(self, tenant: Tenant) -> Tenant:
        """The tenant with its limits of now, as far as this router has heard of them."""
        return self._tenants.get(tenant.tenant_id, tenant)

    def spare(self, tenant: Tenant) -> Spare:
        """See `LocalQuotas.spare`."""
        return self._local.spare(tenant, self._num_routers_of(tenant), self._clock.monotonic_s())

    def note_left(self, tenant: Tenant, left: Left | None) -> None:
        """Redis has said what is left of the tenant's limits. None: too little."""
        if left is None:
            self._local.forget(tenant)
            return
        if self.is_away:  # an answer of before: what was granted here since is not part of it
            return
        self._num_routers[tenant.tenant_id] = left.num_owners
        self._local.note(tenant, left.requests, left.tokens, self._clock.monotonic_s())

    async def _ask(self, one: Reservation, num_open: int, now_s: float) -> None:
        """Reserves ``one``, beside ``num_open`` others, in Redis or here. Raises QuotaExceeded or Unavailable."""
        try:
            is_in_redis = not self.is_away and await self._reserve_in_redis(one)
            if not is_in_redis and self._is_open(one):
                self._reserve_here(one, num_open, now_s)
        except QuotaExceeded as error:
            self._local.forget(one.tenant)
            if one.was_asked_in_vain:  # Redis may have reserved it, and not said so in time
                self.end(one, 0, 0)
            else:
                self._remove(one)
            self.num_refused[one.tenant.name, error.quota] += 1
            raise
        except BaseException:  # cancelled, or refused as Redis is away: it may have been reserved nevertheless
            self.end(one, 0, 0)
            raise
        one.is_granted = True

    def end(self, one: Reservation, prompt_tokens: int, output_tokens: int) -> None:
        """See `Reservation.settle`. A second call has no effect."""
        if not self._remove(one):
            return
        now_s = self._clock.monotonic_s()
        if one.is_local:
            self._local.settle(one.tenant, one.num_tokens, prompt_tokens + output_tokens, now_s)
        used = Used(prompt_tokens, output_tokens, now_s - one.started_at_s)
        self._unsettled.append(_Settlement(one.tenant, one.reservation_id, used))
        self._work.set()

    def keep_only(self, tenant_ids: Set[str]) -> None:
        """Removes what is known of all other tenants, but for requests that still run."""
        self._tenants = {one: tenant for one, tenant in self._tenants.items() if one in tenant_ids}
        self._local.keep_only(tenant_ids)
        self._ahead.keep_only(tenant_ids)
        self._num_routers = {one: number for one, number in self._num_routers.items() if one in tenant_ids}

    async def run(self) -> None:
        """Settles, renews and reserves ahead until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._ahead.run())
            group.create_task(self._renew_repeatedly())
            group.create_task(self._settle_repeatedly())

    async def fill_ahead(self) -> None:
        """See `AheadReservations.fill`. Raises Unavailable."""
        await self._ahead.fill()

    async def settle_all(self, within_s: float) -> None:
        """Sends the settlements that wait, as far as Redis takes them within ``within_s``. Before the router ends."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                with contextlib.suppress(Unavailable):
                    while self._unsettled:
                        await self._settle_some()
                with contextlib.suppress(Unavailable):
                    await self._ahead.release_all()

    async def _reserve_in_redis(self, one: Reservation) -> bool:
        """False if Redis does not respond in time."""
        try:
            async with asyncio.timeout(RESERVE_TIMEOUT_S):
                left = await self._book.reserve(one.tenant, self._owner, one.reservation_id, one.num_tokens)
        except (Unavailable, TimeoutError) as error:
            self.note_away(error)
            one.was_asked_in_vain = True
            return False
        self.note_left(one.tenant, left)
        return True

    def _reserve_here(self, one: Reservation, num_open: int, now_s: float) -> None:
        if self._on_redis_loss == "closed":
            raise Unavailable("quotas cannot be checked: Redis does not respond")
        self._local.grant(one.tenant, one.num_tokens, num_open, self._num_routers_of(one.tenant), now_s)
        one.is_local = True
        self.num_local += 1

    def _is_open(self, one: Reservation) -> bool:
        return one.reservation_id in self._open.get(one.tenant.tenant_id, {})

    def _num_routers_of(self, tenant: Tenant) -> int:
        return max(1, self._num_routers.get(tenant.tenant_id, 1))

    def _remove(self, one: Reservation) -> bool:
        opened = self._open.get(one.tenant.tenant_id, {})
        if opened.pop(one.reservation_id, None) is None:
            return False
        if not opened:
            del self._open[one.tenant.tenant_id]
        return True

    async def _renew_repeatedly(self) -> None:
        while True:
            await asyncio.sleep(RETRY_S if self.is_away else RENEW_EVERY_S)
            with contextlib.suppress(Unavailable):
                await self.renew()

    async def renew(self) -> None:
        """Renews all reservations. Redis counts as present again if it responds. Raises Unavailable."""
        num_lost, num_asked, problem = 0, 0, None
        for tenant_id in {**self._open, **dict.fromkeys(self._ahead.tenant_ids)}:
            opened = self._open.get(tenant_id, {})
            tokens_of = {one.reservation_id: one.num_tokens for one in opened.values() if one.is_granted}
            tokens_of |= self._ahead.tokens_of(tenant_id)
            asked = [one.number for one in opened.values() if not one.is_granted]
            asked += self._ahead.numbers_asked(tenant_id)
            if not tokens_of and not asked:  # the last one has ended since this call began
                continue
            next_number = min(asked, default=self._last_number + 1)
            tenant = self.newest(next(iter(opened.values())).tenant if opened else self._ahead.tenant(tenant_id))
            num_asked += 1
            try:
                renewal = await self._book.renew(tenant, self._owner, next_number, tokens_of)
            except Unavailable as error:  # of a Cluster, others may be on a node that responds
                problem = error
                continue
            self._num_routers[tenant_id] = renewal.num_owners
            num_lost += renewal.num_added
        if self.is_away and problem is None and self._ahead.has_excess:
            num_asked += 1
            try:
                await self._ahead.release_some()
            except Unavailable as error:
                problem = error
        if problem is not None:
            self.note_away(problem)
            raise problem
        if num_lost and not self.is_away:
            _log.warning("Redis had lost %d reservations; they are reserved again", num_lost)
        if num_asked or not self._unsettled:
            self._note_present()

    async def _settle_repeatedly(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            while self._unsettled:
                if len(self._unsettled) < _MAX_SETTLING:
                    await asyncio.sleep(SETTLE_AFTER_S)
                try:
                    await self._settle_some()
                except Unavailable as error:
                    self.note_away(error)
                    self._limit_unsettled()
                    await asyncio.sleep(RETRY_S)

    async def _settle_some(self) -> None:
        """Settles the oldest ones, those of a tenant together. Those that fail stay. Raises Unavailable if any did."""
        batch = list(islice(self._unsettled, _MAX_SETTLING))
        failed, error = await send_by_tenant(batch, self._settle)
        for _ in batch:
            self._unsettled.popleft()
        self._unsettled.extendleft(reversed(failed))
        if error is not None:
            raise error
        self._note_present()

    async def _settle(self, tenant: Tenant, settlements: Sequence[_Settlement]) -> None:
        await self._book.settle(self.newest(tenant), {one.reservation_id: one.used for one in settlements})

    def _limit_unsettled(self) -> None:
        """Adds the oldest settlements up, so that a long absence of Redis does not fill the memory."""
        if len(self._unsettled) <= MAX_UNSETTLED:
            return
        sums: dict[str, _Settlement] = {}
        for one in self._unsettled:
            key, before = one.tenant.tenant_id, sums.get(one.tenant.tenant_id)
            used = one.used if before is None else _sum(before.used, one.used)
            sums[key] = _Settlement(one.tenant, one.reservation_id if before is None else before.reservation_id, used)
        self._unsettled = deque(sums.values())

    def note_away(self, error: Exception) -> None:
        """Redis has not responded."""
        if not self.is_away:
            what = "granted by this router alone" if self._on_redis_loss == "open" else "refused"
            _log.warning("quotas: %s; new requests are %s until it does", str(error) or "Redis does not respond", what)
        self.is_away = True

    def _note_present(self) -> None:
        if self.is_away:
            _log.info("quotas: Redis responds again")
        self.is_away = False


def _sum(first: Used, second: Used) -> Used:
    return Used(first.prompt_tokens + second.prompt_tokens, first.output_tokens + second.output_tokens, second.seconds)
