"""Makes reservations ahead of requests, so that most requests wait for no answer of Redis, and gives back unused ones.

How many and how large they are is decided by `router.reservation_stock`.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from muxmesh.clock import Clock
from muxmesh.errors import Unavailable
from muxmesh.tenants.quota_book import Left
from muxmesh.tenants.tenant import Tenant
from router.reservation import Reservation
from router.reservation_stock import STOCK_EVERY_S, ReservationStock, Spare
from router.tenant_batches import send_by_tenant

_RETRY_S = 1.0
"""After that, what could not be given back is tried again."""
_MAX_RELEASING = 256
"""Reservations that are given back together."""


class Book(Protocol):
    """See `QuotaBook`."""

    async def reserve_ahead(self, tenant: Tenant, owner: str, ids: Sequence[str], num_tokens: int) -> Left | None: ...
    async def release(self, tenant: Tenant, kept_of: Mapping[str, int]) -> None: ...


class Host(Protocol):
    """What the owner of the reservations tells: `router.quota_keeper`."""

    @property
    def is_away(self) -> bool:
        """Whether Redis did not respond when it was called last."""

    def new_reservation(self, tenant: Tenant, num_tokens: int) -> Reservation: ...
    def newest(self, tenant: Tenant) -> Tenant: ...
    def spare(self, tenant: Tenant) -> Spare: ...
    def note_left(self, tenant: Tenant, left: Left | None) -> None: ...
    def note_away(self, error: Exception) -> None: ...


@dataclass(frozen=True, slots=True)
class _Excess:
    """What a reservation has beyond ``num_kept`` tokens is to be given back; with 0 it was never used."""

    tenant: Tenant
    reservation_id: str
    num_kept: int


class AheadReservations:
    """Owns the reservations of one router that no request has yet.

    Invariant: each one that Redis may have is in a stock, asked for, or to be given back, until a request takes it.
    """

    def __init__(self, book: Book, owner: str, host: Host, clock: Clock) -> None:
        self._book, self._owner, self._host, self._clock = book, owner, host, clock
        self._tenants: dict[str, Tenant] = {}
        """By id, as of the last request of each tenant that has a stock."""
        self._stocks: defaultdict[str, ReservationStock[Reservation]] = defaultdict(ReservationStock)
        self._asked: dict[str, list[Reservation]] = {}
        """Those that Redis is asked for, by tenant id."""
        self._excess: deque[_Excess] = deque()
        self._release_again_at_s = -math.inf
        self._has_work = asyncio.Event()

    def take(self, tenant: Tenant, num_tokens: int) -> Reservation | None:
        """The reservation for a request of ``num_tokens`` that is made now. None: there is none that is free."""
        if tenant != self._tenants.get(tenant.tenant_id):  # new, or its limits were changed
            self._give_back(self._stocks[tenant.tenant_id].clear())
            self._tenants[tenant.tenant_id] = tenant
        stock = self._stocks[tenant.tenant_id]
        stock.note(num_tokens)
        self._has_work.set()
        one = stock.take(num_tokens)
        if one is not None and one.num_tokens > num_tokens:
            self._excess.append(_Excess(tenant, one.reservation_id, num_tokens))
            one.num_tokens = num_tokens
        return one

    @property
    def tenant_ids(self) -> Set[str]:
        """Tenants of which there are reservations."""
        return {tenant_id for tenant_id, stock in self._stocks.items() if next(iter(stock), None)} | set(self._asked)

    @property
    def has_excess(self) -> bool:
        """Whether something is to be given back."""
        return bool(self._excess)

    def tenant(self, tenant_id: str) -> Tenant:
        """One of ``tenant_ids``."""
        asked = self._asked.get(tenant_id)
        return asked[0].tenant if asked else self._tenants[tenant_id]

    def tokens_of(self, tenant_id: str) -> Mapping[str, int]:
        """Reservation id → tokens of those that Redis has granted."""
        stock = self._stocks.get(tenant_id, ())
        return {one.reservation_id: one.num_tokens for one in stock}

    def numbers_asked(self, tenant_id: str) -> Sequence[int]:
        """The numbers of those that Redis is asked for."""
        return [one.number for one in self._asked.get(tenant_id, ())]

    def keep_only(self, tenant_ids: Set[str]) -> None:
        """Forgets all of other tenants, which were removed with their reservations."""
        for gone in set(self._stocks) - set(tenant_ids):
            self._forget(gone)
        self._excess = deque(one for one in self._excess if one.tenant.tenant_id in tenant_ids)

    async def run(self) -> None:
        """Fills the stocks while requests come, until cancelled."""
        while True:
            await self._has_work.wait()
            self._has_work.clear()
            while self._stocks or self._excess:
                await asyncio.sleep(STOCK_EVERY_S)
                try:
                    await self.fill()
                except Unavailable as error:
                    self._host.note_away(error)

    async def fill(self) -> None:
        """Ends an interval: makes what is missing and gives back what is unused, later if that fails.

        Raises Unavailable if Redis does not make what is missing.
        """
        now_s = self._clock.monotonic_s()
        for tenant_id, stock in list(self._stocks.items()):
            stock.end_interval()
            if self._host.is_away:
                continue  # what it has granted is kept for requests
            self._give_back(stock.unused(now_s))
            if stock.is_idle and tenant_id not in self._asked:
                self._forget(tenant_id)
        if self._host.is_away:
            return
        fills = [
            self._fill(tenant, stock, *missing)
            for tenant_id, stock in self._stocks.items()
            if tenant_id not in self._asked
            and (missing := stock.missing(self._host.spare(tenant := self._tenants[tenant_id])))[0]
        ]
        results = await asyncio.gather(*fills, return_exceptions=True)
        if now_s >= self._release_again_at_s:
            try:
                await self.release_some()
            except Unavailable:  # of a Cluster, perhaps one node: that says nothing of other calls
                self._release_again_at_s = now_s + _RETRY_S
        for result in results:
            if result is not None:
                raise result

    async def release_all(self) -> None:
        """Gives back all. Before the router ends. Raises Unavailable."""
        for stock in self._stocks.values():
            self._give_back(stock.clear())
        while self._excess:
            await self.release_some()

    async def _fill(self, tenant: Tenant, stock: ReservationStock[Reservation], number: int, num_tokens: int) -> None:
        tenant_id = tenant.tenant_id
        asked = self._asked[tenant_id] = [self._host.new_reservation(tenant, num_tokens) for _ in range(number)]
        ids = [one.reservation_id for one in asked]
        try:
            left = await self._book.reserve_ahead(tenant, self._owner, ids, num_tokens)
        except BaseException:  # they may have been made
            self._give_back(asked)
            raise
        finally:
            del self._asked[tenant_id]
        self._host.note_left(tenant, left)
        if left is None:
            return
        if self._stocks.get(tenant_id) is not stock or self._tenants.get(tenant_id) != tenant:  # changed meanwhile
            self._give_back(asked)
            return
        for one in asked:
            one.is_granted = True
            stock.put(one, self._clock.monotonic_s())

    async def release_some(self) -> None:
        """Gives back the oldest excess, that of a tenant together. What fails stays. Raises Unavailable if any did."""
        batch = list(islice(self._excess, _MAX_RELEASING))
        failed, error = await send_by_tenant(batch, self._release)
        tried = set(map(id, batch))
        self._excess = deque([*(one for one in self._excess if id(one) not in tried), *failed])
        if error is not None:
            raise error

    async def _release(self, tenant: Tenant, excess: Sequence[_Excess]) -> None:
        await self._book.release(self._host.newest(tenant), {one.reservation_id: one.num_kept for one in excess})

    def _give_back(self, unused: Iterable[Reservation]) -> None:
        self._excess.extend(_Excess(one.tenant, one.reservation_id, 0) for one in unused)

    def _forget(self, tenant_id: str) -> None:
        self._stocks.pop(tenant_id, None)
        self._tenants.pop(tenant_id, None)
