"""Reservations and settlements of one router, with a book in memory and a real one."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxmesh.clock import ManualClock
from muxmesh.errors import QuotaExceeded, Unavailable
from muxmesh.redis_connection import open_redis
from muxmesh.tenants.quota_book import Left, QuotaBook, Renewal, Used
from muxmesh.tenants.tenant import Tenant, quota_exceeded
from router import ahead_reservations, quota_keeper
from router.local_quotas import LocalQuotas
from router.quota_keeper import QuotaKeeper
from router.reservation import Reservation
from router.reservation_stock import NOTHING_TO_SPARE, Spare
from tests.support.redis_process import running_redis
from tests.support.tenants import tenant

ONE = tenant(tokens_per_minute=1000)
LARGE = tenant(tokens_per_minute=100_000)
"""It can spare reservations that no request has yet."""


class FakeBook:
    """Quotas in memory. ``error``: raised instead of an answer. ``loses_answers``: it is raised after the change."""

    def __init__(self) -> None:
        self.open: dict[str, int] = {}
        self.tenant_of: dict[str, str] = {}
        self.settled: dict[str, Used] = {}
        self.charged = 0
        self.error: Exception | None = None
        self.loses_answers = False
        self.gate: asyncio.Event | None = None
        self.num_calls = 0
        self.num_renewals = 0
        self.renewed: list[tuple[int, dict[str, int]]] = []

    async def _answer(self) -> None:
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error

    async def reserve(self, of: Tenant, owner: str, reservation_id: str, num_tokens: int) -> Left:
        self.num_calls += 1
        if not self.loses_answers:
            await self._answer()
        limit = of.limits.tokens_per_minute
        if reservation_id in self.settled:
            return Left(0.0, 0.0)
        if limit is not None and self.charged + sum(self.open.values()) + num_tokens > limit:
            raise quota_exceeded(of, "tokens_per_minute", 0, num_tokens, 3.0)
        self.open[reservation_id] = num_tokens
        self.tenant_of[reservation_id] = of.tenant_id
        if self.loses_answers:
            await self._answer()
        return Left(0.0, 0.0 if limit is None else limit - self.charged - sum(self.open.values()))

    async def reserve_ahead(self, of: Tenant, owner: str, ids: Sequence[str], num_tokens: int) -> Left | None:
        limit = of.limits.tokens_per_minute
        needed = num_tokens * len(ids)
        if limit is not None and self.charged + sum(self.open.values()) + needed > limit:
            self.num_calls += 1
            await self._answer()
            return None
        return [await self.reserve(of, owner, one, num_tokens) for one in ids][-1]

    async def release(self, of: Tenant, kept_of: Mapping[str, int]) -> None:
        self.num_calls += 1
        if not self.loses_answers:
            await self._answer()
        for reservation_id, kept in kept_of.items():
            if kept and reservation_id in self.open:
                self.open[reservation_id] = kept
            elif not kept:
                self.open.pop(reservation_id, None)
                self.settled.setdefault(reservation_id, Used(0, 0, 0.0))
        if self.loses_answers:
            await self._answer()

    async def settle(self, of: Tenant, used_of: Mapping[str, Used]) -> None:
        self.num_calls += 1
        if not self.loses_answers:
            await self._answer()
        for reservation_id, used in used_of.items():
            self.open.pop(reservation_id, None)
            if reservation_id not in self.settled:
                self.settled[reservation_id] = used
                self.charged += used.prompt_tokens + used.output_tokens
        if self.loses_answers:
            await self._answer()

    async def renew(self, of: Tenant, owner: str, next_number: int, tokens_of: Mapping[str, int]) -> Renewal:
        self.num_renewals += 1
        self.renewed.append((next_number, dict(tokens_of)))
        await self._answer()
        lost = {key: value for key, value in tokens_of.items() if key not in self.open and key not in self.settled}
        own = {key for key in self.open if self.tenant_of[key] == of.tenant_id}
        unlisted = {key for key in own if int(key.rpartition("-")[2]) < next_number} - set(tokens_of)
        self.open = {key: value for key, value in self.open.items() if key not in unlisted} | lost
        return Renewal(len(lost), 2)


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


@pytest.fixture
def book() -> FakeBook:
    return FakeBook()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(100.0)


@pytest.fixture
def keeper(book: FakeBook, clock: ManualClock) -> QuotaKeeper:
    return QuotaKeeper(book, "r", "open", clock)


async def warm(keeper: QuotaKeeper) -> list[Reservation]:
    """Two requests of 10 tokens (r-1, r-2), for which a stock expects a third one (r-3)."""
    return [await keeper.reserve(LARGE, 10) for _ in range(2)]


async def test_after_the_first_requests_the_next_ones_wait_for_no_answer(keeper: QuotaKeeper, book: FakeBook) -> None:
    await warm(keeper)
    await keeper.fill_ahead()
    assert book.open == {"r-1": 10, "r-2": 10, "r-3": 10}
    book.gate = asyncio.Event()
    ahead = await keeper.reserve(LARGE, 10)
    assert (ahead.reservation_id, keeper.num_open) == ("r-3", 3)
    asks = asyncio.ensure_future(keeper.reserve(LARGE, 10))
    await until(lambda: book.num_calls == 4)
    book.gate.set()
    assert (await asks).reservation_id == "r-4"
    ahead.settle(3, 1)
    await keeper.settle_all(20)
    assert (book.open, book.charged) == ({"r-1": 10, "r-2": 10, "r-4": 10}, 4)


async def test_a_reservation_made_ahead_is_for_requests_of_its_size(keeper: QuotaKeeper, book: FakeBook) -> None:
    await warm(keeper)
    await keeper.fill_ahead()
    assert (await keeper.reserve(LARGE, 11)).reservation_id == "r-4"
    assert (await keeper.reserve(LARGE, 10)).reservation_id == "r-3"


async def test_what_a_request_does_not_need_of_its_reservation_is_given_back(
    keeper: QuotaKeeper, book: FakeBook
) -> None:
    await warm(keeper)
    await keeper.fill_ahead()
    assert (await keeper.reserve(LARGE, 4)).num_tokens == 4
    await keeper.fill_ahead()
    assert book.open["r-3"] == 4


async def test_what_no_request_has_used_is_given_back_and_not_charged(
    keeper: QuotaKeeper, book: FakeBook, clock: ManualClock
) -> None:
    for one in await warm(keeper):
        one.settle(1, 1)
    await keeper.fill_ahead()
    assert "r-3" in book.open
    for _ in range(40):
        clock.advance(0.1)
        await keeper.fill_ahead()
    assert list(book.open) == ["r-1", "r-2"]
    await keeper.settle_all(20)
    assert (book.open, book.charged, keeper.num_open) == ({}, 4, 0)


async def test_a_refusal_ahead_of_requests_is_not_repeated_at_once(keeper: QuotaKeeper, book: FakeBook) -> None:
    await warm(keeper)
    book.charged = 99_990
    num_calls = book.num_calls
    for _ in range(3):
        await keeper.fill_ahead()
    assert book.num_calls == num_calls + 1


async def test_a_router_that_ends_gives_back_what_it_has_reserved_ahead(keeper: QuotaKeeper, book: FakeBook) -> None:
    for one in await warm(keeper):
        one.settle(0, 0)
    await keeper.fill_ahead()
    assert book.open
    await keeper.settle_all(20)
    assert book.open == {}


async def test_a_router_that_ends_settles_although_nothing_can_be_given_back(
    keeper: QuotaKeeper, book: FakeBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: Any) -> None:
        raise Unavailable("a node is down")

    for one in await warm(keeper):
        one.settle(1, 1)
    await keeper.fill_ahead()
    monkeypatch.setattr(book, "release", fails)
    await keeper.settle_all(20)
    assert (book.charged, list(book.open)) == (4, ["r-3"])


async def test_a_tenant_whose_reservations_cannot_be_given_back_holds_up_no_other(
    keeper: QuotaKeeper, book: FakeBook, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails_for_acme(of: Tenant, kept_of: Mapping[str, int]) -> None:
        if of.name == "acme":
            raise Unavailable("a node is down")
        await release(of, kept_of)

    release = book.release
    monkeypatch.setattr(book, "release", fails_for_acme)
    await warm(keeper)
    for _ in range(2):
        await keeper.reserve(tenant("other"), 10)
    await keeper.fill_ahead()
    assert {"r-5", "r-6"} <= set(book.open)
    for _ in range(3):
        clock.advance(2.0)
        await keeper.fill_ahead()
    assert "r-5" in book.open and "r-6" not in book.open
    assert not keeper.is_away


async def test_what_was_reserved_ahead_is_used_while_redis_is_away_and_renewed_when_it_returns(
    keeper: QuotaKeeper, book: FakeBook, clock: ManualClock
) -> None:
    await warm(keeper)
    await keeper.fill_ahead()
    book.error = Unavailable("gone")
    here = await keeper.reserve(LARGE, 20)
    clock.advance(60.0)
    ahead = await keeper.reserve(LARGE, 10)
    assert here.is_local and not ahead.is_local
    await keeper.fill_ahead()
    book.error = None
    book.open.clear()
    await keeper.renew()
    assert book.open == {"r-1": 10, "r-2": 10, "r-3": 10, "r-4": 20}


async def test_redis_stays_away_until_it_takes_back_what_is_unused(keeper: QuotaKeeper, book: FakeBook) -> None:
    """No request runs and none is unsettled, so that nothing else asks it."""
    for one in await warm(keeper):
        one.settle(0, 0)
    await keeper.settle_all(20)
    book.error, book.loses_answers = Unavailable("gone"), True
    with pytest.raises(Unavailable):
        await keeper.fill_ahead()
    keeper.note_away(book.error)
    for _ in range(2):
        with pytest.raises(Unavailable):
            await keeper.renew()
        assert keeper.is_away
    book.error = None
    await keeper.renew()
    assert not keeper.is_away and book.open == {}


async def test_a_tenant_that_is_removed_while_redis_is_asked_gets_nothing(keeper: QuotaKeeper, book: FakeBook) -> None:
    for one in await warm(keeper):
        one.settle(0, 0)
    book.gate = asyncio.Event()
    filling = asyncio.ensure_future(keeper.fill_ahead())
    await until(lambda: book.num_calls == 3)
    keeper.keep_only(set())
    again = asyncio.ensure_future(keeper.reserve(LARGE, 10))
    renewing = asyncio.ensure_future(keeper.renew())
    await until(lambda: book.num_calls == 4)
    book.gate.set()
    await asyncio.gather(filling, renewing)
    assert (await again).reservation_id == "r-4", "that of the tenant before is not used"
    await keeper.fill_ahead()
    assert "r-3" not in book.open


async def test_a_tenant_that_was_refused_has_no_full_bucket_when_redis_goes_away(
    keeper: QuotaKeeper, book: FakeBook
) -> None:
    await keeper.reserve(ONE, 900)
    with pytest.raises(QuotaExceeded):
        await keeper.reserve(ONE, 500)
    book.error = Unavailable("gone")
    with pytest.raises(QuotaExceeded, match="100 of 1000 per minute are left"):
        await keeper.reserve(ONE, 500)


async def test_redis_is_never_told_limits_of_before(
    keeper: QuotaKeeper, book: FakeBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would fill the bucket again, or clip it."""
    told: list[int | None] = []
    settle, renew = book.settle, book.renew

    async def recorded_settle(of: Tenant, used_of: Mapping[str, Used]) -> None:
        told.append(of.limits.tokens_per_minute)
        await settle(of, used_of)

    async def recorded_renew(of: Tenant, *arguments: Any) -> Renewal:
        told.append(of.limits.tokens_per_minute)
        return await renew(of, *arguments)

    monkeypatch.setattr(book, "settle", recorded_settle)
    monkeypatch.setattr(book, "renew", recorded_renew)
    old = await keeper.reserve(tenant(tokens_per_minute=500), 10)
    await keeper.reserve(ONE, 10)
    await keeper.renew()
    old.settle(1, 1)
    await keeper.settle_all(20)
    assert told == [1000, 1000]


async def test_changed_limits_give_back_what_was_reserved_ahead(keeper: QuotaKeeper, book: FakeBook) -> None:
    await warm(keeper)
    await keeper.fill_ahead()
    changed = tenant(tokens_per_minute=99_999)
    assert (await keeper.reserve(changed, 10)).reservation_id == "r-4"
    await keeper.fill_ahead()
    assert "r-3" not in book.open and "r-5" in book.open


async def test_a_tenant_that_was_removed_is_not_written_to(keeper: QuotaKeeper, book: FakeBook) -> None:
    await warm(keeper)
    await keeper.fill_ahead()
    keeper.keep_only(set())
    num_calls = book.num_calls
    await keeper.fill_ahead()
    assert book.num_calls == num_calls


async def test_answers_that_are_lost_leave_nothing_reserved_ahead(keeper: QuotaKeeper, book: FakeBook) -> None:
    for one in await warm(keeper):
        one.settle(0, 0)
    book.loses_answers, book.error = True, Unavailable("lost")
    with pytest.raises(Unavailable):
        await keeper.fill_ahead()
    book.loses_answers, book.error = False, None
    await keeper.settle_all(20)
    assert "r-3" in book.settled and book.open == {}


async def test_a_renewal_leaves_out_what_is_being_reserved_ahead(keeper: QuotaKeeper, book: FakeBook) -> None:
    await warm(keeper)
    book.gate = asyncio.Event()
    filling = asyncio.ensure_future(keeper.fill_ahead())
    await until(lambda: book.num_calls == 3)
    renewing = asyncio.ensure_future(keeper.renew())
    await until(lambda: book.num_renewals)
    book.gate.set()
    await asyncio.gather(filling, renewing)
    assert book.renewed == [(3, {"r-1": 10, "r-2": 10})]
    await keeper.renew()
    assert book.renewed[1] == (4, {"r-1": 10, "r-2": 10, "r-3": 10})


async def test_the_background_task_reserves_ahead_and_bears_a_redis_that_goes_away(
    keeper: QuotaKeeper, book: FakeBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead_reservations, "STOCK_EVERY_S", 0.0)
    monkeypatch.setattr(quota_keeper, "RETRY_S", 0.0)
    running = asyncio.ensure_future(keeper.run())
    await warm(keeper)
    await until(lambda: "r-3" in book.open)
    await warm(keeper)
    book.error = Unavailable("gone")
    await until(lambda: keeper.is_away)
    book.error = None
    await until(lambda: not keeper.is_away)
    await warm(keeper)
    running.cancel()


async def test_a_request_is_reserved_and_settled_once(keeper: QuotaKeeper, book: FakeBook, clock: ManualClock) -> None:
    one = await keeper.reserve(ONE, 400)
    assert (book.open, keeper.num_open) == ({"r-1": 400}, 1)
    clock.advance(2.5)
    one.settle(100, 50)
    one.settle(7, 7)
    assert (keeper.num_open, keeper.num_unsettled) == (0, 1)
    await keeper.settle_all(20)
    assert book.settled == {"r-1": Used(100, 50, 2.5)}
    assert (book.open, keeper.num_unsettled) == ({}, 0)


async def test_a_refused_request_leaves_nothing_and_is_counted(keeper: QuotaKeeper, book: FakeBook) -> None:
    with pytest.raises(QuotaExceeded, match="needs 2000 tokens") as caught:
        await keeper.reserve(ONE, 2000)
    assert caught.value.retry_after_s == 3.0
    assert (keeper.num_open, keeper.num_unsettled) == (0, 0)
    assert keeper.num_refused == {("acme", "tokens_per_minute"): 1}


async def test_a_request_that_is_cancelled_while_redis_answers_is_given_back(
    keeper: QuotaKeeper, book: FakeBook
) -> None:
    book.gate, book.loses_answers = asyncio.Event(), True
    task = asyncio.ensure_future(keeper.reserve(ONE, 400))
    await until(lambda: book.open)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert keeper.num_open == 0
    book.gate.set()
    await keeper.settle_all(20)
    assert (book.open, book.charged) == ({}, 0)


async def test_while_redis_is_away_requests_are_granted_here_and_settled_when_it_returns(
    keeper: QuotaKeeper, book: FakeBook
) -> None:
    before = await keeper.reserve(ONE, 100)
    book.error = Unavailable("Redis does not respond: gone")
    here = await keeper.reserve(ONE, 400)
    assert keeper.is_away and keeper.num_local == 1
    num_calls = book.num_calls
    with pytest.raises(QuotaExceeded):
        await keeper.reserve(ONE, 700)
    assert book.num_calls == num_calls, "a Redis that is away is not asked for each request"
    here.settle(50, 50)
    before.settle(10, 10)
    await keeper.settle_all(0.01)
    assert keeper.num_unsettled == 2
    book.error = None
    await keeper.settle_all(20)
    assert not keeper.is_away
    assert (book.charged, book.open) == (120, {})


async def test_an_answer_that_is_lost_charges_nothing_twice(keeper: QuotaKeeper, book: FakeBook) -> None:
    book.loses_answers, book.error = True, Unavailable("lost")
    one = await keeper.reserve(ONE, 400)
    assert book.open == {"r-1": 400}
    book.error = None
    await keeper.renew()
    assert book.open == {"r-1": 400}
    book.error = Unavailable("lost")
    one.settle(30, 20)
    await keeper.settle_all(0.01)
    assert (book.charged, keeper.num_unsettled) == (50, 1)
    book.error = None
    await keeper.settle_all(20)
    assert (book.charged, keeper.num_unsettled) == (50, 0)


async def test_a_request_that_is_refused_here_as_redis_did_not_answer_in_time_is_settled(
    keeper: QuotaKeeper, book: FakeBook
) -> None:
    await keeper.reserve(ONE, 900)
    book.loses_answers, book.error = True, Unavailable("lost")
    with pytest.raises(QuotaExceeded):
        await keeper.reserve(tenant(tokens_per_minute=100_000, max_concurrent_requests=1), 50)
    assert "r-2" in book.open
    book.error = None
    await keeper.settle_all(20)
    assert "r-2" not in book.open and book.charged == 0


async def test_closed_refuses_while_redis_is_away(book: FakeBook, clock: ManualClock) -> None:
    keeper = QuotaKeeper(book, "r", "closed", clock)
    book.error = Unavailable("Redis does not respond: gone")
    with pytest.raises(Unavailable, match="quotas cannot be checked"):
        await keeper.reserve(ONE, 1)
    assert keeper.num_open == 0
    book.error = None
    await keeper.settle_all(20)
    assert book.charged == 0
    await keeper.reserve(ONE, 1)


async def test_a_redis_that_hangs_counts_as_away(
    keeper: QuotaKeeper, book: FakeBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota_keeper, "RESERVE_TIMEOUT_S", 0.0)
    book.gate = asyncio.Event()
    await keeper.reserve(ONE, 400)
    assert keeper.is_away and keeper.num_open == 1


async def test_renewals_reserve_again_what_redis_has_lost(
    keeper: QuotaKeeper, book: FakeBook, caplog: pytest.LogCaptureFixture
) -> None:
    await keeper.reserve(ONE, 400)
    await keeper.reserve(tenant("other"), 5)
    book.open.clear()
    await keeper.renew()
    assert book.open == {"r-1": 400, "r-2": 5}
    assert "Redis had lost 2 reservations" in caplog.text


async def test_a_renewal_leaves_out_what_redis_has_not_granted_yet(keeper: QuotaKeeper, book: FakeBook) -> None:
    """Redis may refuse it: then a renewal that named it would have made it all the same."""
    await keeper.reserve(ONE, 400)
    await keeper.reserve(ONE, 100)
    book.gate = asyncio.Event()
    refused = asyncio.ensure_future(keeper.reserve(ONE, 5000))
    renewing = asyncio.ensure_future(keeper.renew())
    await until(lambda: book.num_renewals)
    book.gate.set()
    await asyncio.gather(refused, renewing, return_exceptions=True)
    assert book.renewed == [(3, {"r-1": 400, "r-2": 100})]
    assert book.open == {"r-1": 400, "r-2": 100}
    await keeper.renew()
    assert book.renewed[1] == (4, {"r-1": 400, "r-2": 100})


async def test_requests_that_end_while_others_are_renewed_need_no_renewal(keeper: QuotaKeeper, book: FakeBook) -> None:
    await keeper.reserve(ONE, 400)
    other = await keeper.reserve(tenant("other"), 5)
    book.gate = asyncio.Event()
    renewing = asyncio.ensure_future(keeper.renew())
    await until(lambda: book.num_renewals)
    other.settle(1, 1)
    book.gate.set()
    await renewing
    assert book.num_renewals == 1


async def test_after_a_renewal_the_local_part_is_that_of_one_router(keeper: QuotaKeeper, book: FakeBook) -> None:
    first = await keeper.reserve(ONE, 100)
    await keeper.renew()
    book.error = Unavailable("gone")
    await keeper.reserve(ONE, 100)
    with pytest.raises(QuotaExceeded, match="350 of 1000 per minute are left"):
        await keeper.reserve(ONE, 450)
    first.settle(0, 0)


async def test_the_background_tasks_settle_and_renew(
    keeper: QuotaKeeper, book: FakeBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota_keeper, "RENEW_EVERY_S", 0.0)
    monkeypatch.setattr(quota_keeper, "RETRY_S", 0.0)
    running = asyncio.ensure_future(keeper.run())
    one, stays = await keeper.reserve(ONE, 400), await keeper.reserve(ONE, 1)
    one.settle(1, 1)
    await until(lambda: "r-1" in book.settled and book.num_renewals > 2)
    book.error = Unavailable("gone")
    stays.settle(2, 2)
    await until(lambda: keeper.is_away)
    book.error = None
    await until(lambda: "r-2" in book.settled and not keeper.is_away)
    assert book.charged == 6
    running.cancel()


async def test_very_many_unsettled_requests_are_added_up(
    keeper: QuotaKeeper, book: FakeBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota_keeper, "MAX_UNSETTLED", 10)
    monkeypatch.setattr(quota_keeper, "RETRY_S", 0.0)
    book.error = Unavailable("gone")
    running = asyncio.ensure_future(keeper.run())
    for _ in range(30):
        (await keeper.reserve(tenant(), 10)).settle(3, 2)
    await until(lambda: keeper.num_unsettled == 1)
    book.error = None
    await until(lambda: keeper.num_unsettled == 0)
    assert book.charged == 150
    running.cancel()


_STEPS = ("reserve", "settle", "renew", "fill", "wait", "flush", "away", "back", "lose")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(_STEPS), st.integers(0, 9))))
def test_whatever_happens_each_request_is_charged_once(steps: list[tuple[str, int]]) -> None:
    async def play() -> None:
        book = FakeBook()
        clock = ManualClock()
        keeper, opened, used = QuotaKeeper(book, "r", "open", clock), [], 0
        for what, number in steps:
            if what == "reserve":
                opened.append(await keeper.reserve(tenant(), number))
            elif what == "settle" and opened:
                opened.pop(number % len(opened)).settle(number, 1)
                used += number + 1
            elif what == "renew":
                with contextlib.suppress(Unavailable):
                    await keeper.renew()
            elif what == "wait":
                clock.advance(number / 3)
            elif what == "fill":
                with contextlib.suppress(Unavailable):
                    await keeper.fill_ahead()
            elif what == "flush":
                book.open.clear()  # Redis has restarted empty, but what was settled is charged
            elif what in ("away", "lose"):
                book.error, book.loses_answers = Unavailable("gone"), what == "lose"
            elif what == "back":
                book.error, book.loses_answers = None, False
            if number % 2:
                await keeper.settle_all(0.001)
        book.error = None
        for one in opened:
            one.settle(0, 0)
        await keeper.renew()
        await keeper.settle_all(20)
        assert (book.charged, keeper.num_open, keeper.num_unsettled, book.open) == (used, 0, 0, {})

    asyncio.run(play())


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    with running_redis(tmp_path) as url:
        yield url


async def test_a_real_redis_ends_as_the_book_in_memory(redis_url: str, clock: ManualClock) -> None:
    client = open_redis(redis_url)
    book = QuotaBook(client, "mesh")
    keeper = QuotaKeeper(book, "r", "open", clock)
    one, other = await keeper.reserve(ONE, 400), await keeper.reserve(ONE, 500)
    with pytest.raises(QuotaExceeded, match=r"needs 200 tokens, and 1\d\d of 1000 per minute are left"):
        await keeper.reserve(ONE, 200)
    one.settle(10, 20)
    await keeper.settle_all(20)
    await client.flushall()
    await keeper.renew()
    other.settle(5, 5)
    await keeper.settle_all(20)
    usage = await book.usage(ONE)
    assert (usage.requests, usage.prompt_tokens, usage.output_tokens, usage.open_requests) == (1, 5, 5, 0)
    await client.aclose()


@pytest.mark.parametrize(
    ("limits", "left", "num_routers", "expected"),
    [
        ({}, (0.0, 0.0), 9, Spare(math.inf, math.inf)),
        ({"tokens_per_minute": 6400}, (0.0, 1600.0), 1, Spare(math.inf, 100.0)),
        ({"tokens_per_minute": 6400}, (0.0, 1600.0), 2, Spare(math.inf, 50.0)),
        ({"tokens_per_minute": 6400}, (0.0, 1599.0), 1, NOTHING_TO_SPARE),
        ({"requests_per_minute": 640}, (160.0, 0.0), 1, Spare(10.0, math.inf)),
        ({"requests_per_minute": 640}, (159.0, 0.0), 1, NOTHING_TO_SPARE),
        ({"max_concurrent_requests": 64}, (0.0, 0.0), 1, Spare(1.0, math.inf)),
    ],
)
def test_what_a_tenant_can_spare(
    limits: dict[str, Any], left: tuple[float, float], num_routers: int, expected: Spare
) -> None:
    local, of = LocalQuotas(), tenant(**limits)
    assert local.spare(of, num_routers, 100.0) == NOTHING_TO_SPARE, "nothing is known"
    local.note(of, *left, 100.0)
    assert local.spare(of, num_routers, 105.0) == expected
    assert local.spare(of, num_routers, 105.1) == NOTHING_TO_SPARE, "it was long ago"


def test_local_buckets_refill_with_time_and_hold_a_part() -> None:
    local, one = LocalQuotas(), tenant(requests_per_minute=6, tokens_per_minute=600, max_concurrent_requests=4)
    for now_s in (0.0, 0.0, 0.0):
        local.grant(one, 50, 0, 2, now_s)
    with pytest.raises(QuotaExceeded) as caught:
        local.grant(one, 50, 0, 2, 1.0)
    assert caught.value.quota == "requests_per_minute"
    assert caught.value.retry_after_s == pytest.approx(19.0)
    local.grant(one, 50, 0, 2, 20.1)
    with pytest.raises(QuotaExceeded) as caught:
        local.grant(one, 50, 2, 2, 60.0)
    assert caught.value.quota == "max_concurrent_requests"
    local.settle(one, 50, 350, 60.0)
    with pytest.raises(QuotaExceeded) as caught:
        local.grant(one, 50, 0, 2, 60.0)
    assert caught.value.quota == "tokens_per_minute"
    local.keep_only({"id-other"})
    local.grant(one, 50, 0, 2, 60.0)


def test_local_buckets_begin_with_what_redis_said_is_left() -> None:
    local, one = LocalQuotas(), tenant(tokens_per_minute=600)
    local.note(one, 0.0, 200.0, 0.0)
    local.grant(one, 100, 0, 2, 0.0)
    with pytest.raises(QuotaExceeded) as caught:
        local.grant(one, 100, 0, 2, 0.0)
    assert caught.value.retry_after_s == pytest.approx(20.0)
    local.note(one, 0.0, 600.0, 1.0)
    local.grant(one, 300, 0, 2, 1.0)


def test_a_local_request_larger_than_the_bucket_waits_until_it_is_full() -> None:
    local, one = LocalQuotas(), tenant(tokens_per_minute=60)
    local.grant(one, 100, 0, 1, 0.0)
    with pytest.raises(QuotaExceeded) as caught:
        local.grant(one, 100, 0, 1, 0.0)
    assert caught.value.retry_after_s == pytest.approx(100.0)


def test_a_tenant_without_limits_is_granted_everything() -> None:
    local = LocalQuotas()
    for _ in range(1000):
        local.grant(tenant(), 10**6, 1000, 1, 0.0)
