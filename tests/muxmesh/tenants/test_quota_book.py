"""The quota scripts in a real Redis. Elapsed time is written into the state, so that no test waits."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from muxmesh.errors import QuotaExceeded, Unavailable
from muxmesh.redis_connection import open_redis
from muxmesh.tenants.quota_book import QuotaBook, Used
from muxmesh.tenants.tenant import Tenant
from tests.support.tenants import tenant

NOTHING = Used(0, 0, 1.0)


@pytest.fixture
def book(client: Any) -> QuotaBook:
    return QuotaBook(client, "mesh")


def key(one: Tenant, name: str) -> str:
    return f"muxmesh:{{mesh/{one.tenant_id}}}:{name}"


async def pass_time(client: Any, one: Tenant, seconds: float) -> None:
    """As if ``seconds`` had passed: for buckets, for routers and for what is settled."""
    at = float(await client.hget(key(one, "quota"), "at"))
    await client.hset(key(one, "quota"), "at", f"{at - seconds:.6f}")
    for name in ("owners", "settled"):
        for member, score in await client.zrange(key(one, name), 0, -1, withscores=True):
            await client.zadd(key(one, name), {member: score - seconds})


async def refusal(book: QuotaBook, one: Tenant, reservation_id: str, num_tokens: int = 10) -> QuotaExceeded:
    with pytest.raises(QuotaExceeded) as caught:
        await book.reserve(one, "r", reservation_id, num_tokens)
    return caught.value


async def tokens_left(book: QuotaBook, one: Tenant) -> int:
    left = (await book.usage(one)).tokens_left
    assert left is not None
    return left


async def test_a_bucket_of_requests_holds_those_of_a_minute(book: QuotaBook, client: Any) -> None:
    one = tenant(requests_per_minute=6)
    for number in range(6):
        await book.reserve(one, "r", f"r-{number}", 10)
    error = await refusal(book, one, "r-6")
    assert error.quota == "requests_per_minute"
    assert 9.5 < error.retry_after_s <= 10
    await pass_time(client, one, error.retry_after_s + 0.01)
    await book.reserve(one, "r", "r-7", 10)
    assert (await book.usage(one)).refused == 1


async def test_tokens_are_reserved_and_settled_by_what_was_used(book: QuotaBook, client: Any) -> None:
    one = tenant(tokens_per_minute=6000)
    await book.reserve(one, "r", "r-1", 4000)
    assert 2000 <= await tokens_left(book, one) <= 2100
    error = await refusal(book, one, "r-2", 5000)
    assert error.quota == "tokens_per_minute"
    assert error.retry_after_s == pytest.approx(30, abs=1)
    assert "needs 5000 tokens" in str(error)
    await book.settle(one, {"r-1": Used(100, 400, 2.0)})
    assert 5500 <= await tokens_left(book, one) <= 5600
    usage = await book.usage(one)
    assert (usage.requests, usage.prompt_tokens, usage.output_tokens, usage.open_requests) == (1, 100, 400, 0)


async def test_a_settlement_that_arrives_twice_changes_nothing(book: QuotaBook) -> None:
    one = tenant(tokens_per_minute=6000)
    await book.reserve(one, "r", "r-1", 1000)
    for _ in range(3):
        await book.settle(one, {"r-1": Used(1500, 1500, 1.0)})
    assert 3000 <= await tokens_left(book, one) <= 3100
    assert (await book.usage(one)).requests == 1


async def test_a_reservation_that_arrives_twice_is_charged_once(book: QuotaBook) -> None:
    one = tenant(tokens_per_minute=6000, requests_per_minute=60, max_concurrent_requests=1)
    await book.reserve(one, "r", "r-1", 1000)
    await book.reserve(one, "r", "r-1", 1000)
    usage = await book.usage(one)
    assert (usage.requests_left, usage.open_requests, usage.reserved_tokens) == (59, 1, 1000)


async def test_a_reservation_that_arrives_after_its_settlement_is_not_made(book: QuotaBook) -> None:
    """The router has not waited for it."""
    one = tenant(tokens_per_minute=6000)
    await book.settle(one, {"r-1": NOTHING})
    await book.reserve(one, "r", "r-1", 1000)
    assert (await book.usage(one)).open_requests == 0
    assert await tokens_left(book, one) == 6000


async def test_reservations_ahead_are_made_together_or_not_at_all(book: QuotaBook) -> None:
    one = tenant(tokens_per_minute=6000, requests_per_minute=60, max_concurrent_requests=3)
    left = await book.reserve_ahead(one, "r", ["r-1", "r-2"], 1000)
    assert left is not None and 4000 <= left.tokens <= 4100 and 58 <= left.requests <= 59
    usage = await book.usage(one)
    assert (usage.open_requests, usage.reserved_tokens) == (2, 2000)
    assert await book.reserve_ahead(one, "r", ["r-3", "r-4"], 10) is None, "four at once are too many"
    assert await book.reserve_ahead(one, "r", ["r-3"], 5000) is None, "so many tokens are not left"
    usage = await book.usage(one)
    assert (usage.open_requests, usage.refused) == (2, 0)


async def test_reservations_that_no_request_has_used_leave_no_trace(book: QuotaBook) -> None:
    one = tenant(tokens_per_minute=6000, requests_per_minute=60)
    await book.reserve_ahead(one, "r", ["r-1", "r-2"], 1000)
    for _ in range(2):
        await book.release(one, {"r-1": 0, "r-2": 0})
    usage = await book.usage(one)
    assert (usage.requests_left, usage.tokens_left, usage.open_requests, usage.requests) == (60, 6000, 0, 0)
    await book.reserve_ahead(one, "r", ["r-1"], 1000)
    assert (await book.usage(one)).open_requests == 0, "it arrived after its release"


async def test_what_a_reservation_has_too_much_is_given_back(book: QuotaBook) -> None:
    one = tenant(tokens_per_minute=6000, requests_per_minute=60)
    await book.reserve_ahead(one, "r", ["r-1"], 1000)
    for _ in range(2):
        await book.release(one, {"r-1": 200})
    usage = await book.usage(one)
    assert (usage.requests_left, usage.open_requests, usage.reserved_tokens) == (59, 1, 200)
    assert usage.tokens_left is not None and 5800 <= usage.tokens_left <= 5900
    await book.settle(one, {"r-1": Used(100, 0, 1.0)})
    await book.release(one, {"r-1": 200})
    assert 5900 <= await tokens_left(book, one) < 6000
    assert (await book.usage(one)).open_requests == 0


async def test_requests_of_a_router_that_was_too_late_are_charged_once(book: QuotaBook, client: Any) -> None:
    """Their reservations were given back meanwhile, requests too."""
    one = tenant(tokens_per_minute=6000, requests_per_minute=60)
    for number in (1, 2, 3):
        await book.reserve(one, "r", f"r-{number}", 1000)
    await client.hset(key(one, "quota"), mapping={"requests": 30, "tokens": 1000})
    for member in await client.zrange(key(one, "owners"), 0, -1):
        await client.zadd(key(one, "owners"), {member: 1})
    await book.settle(one, {"r-1": Used(100, 0, 1.0)})
    await book.renew(one, "r", 4, {"r-2": 1000, "r-3": 1000})
    usage = await book.usage(one)
    assert (usage.open_requests, usage.requests_left) == (2, 30)
    assert usage.tokens_left is not None and 1900 <= usage.tokens_left <= 2000


async def test_a_settlement_that_comes_after_a_renewal_charges_its_request_once(book: QuotaBook) -> None:
    """The request had ended before the renewal, which no longer names it."""
    one = tenant(tokens_per_minute=6000, requests_per_minute=60)
    await book.reserve(one, "r", "r-1", 1000)
    await book.renew(one, "r", 2, {})
    await book.settle(one, {"r-1": Used(100, 50, 1.0)})
    usage = await book.usage(one)
    assert (usage.requests_left, usage.requests, usage.open_requests) == (59, 1, 0)
    assert usage.tokens_left is not None and 5850 <= usage.tokens_left <= 5950


async def test_a_request_larger_than_the_bucket_is_granted_when_it_is_full(book: QuotaBook, client: Any) -> None:
    one = tenant(tokens_per_minute=600)
    await book.reserve(one, "r", "r-1", 1500)
    assert -900 <= await tokens_left(book, one) <= -890
    error = await refusal(book, one, "r-2", 1)
    assert 89 < error.retry_after_s < 91
    await pass_time(client, one, 60)
    await book.settle(one, {"r-1": Used(1500, 0, 1.0)})
    assert -300 <= await tokens_left(book, one) <= -290


async def test_concurrent_requests_are_those_that_have_not_settled(book: QuotaBook) -> None:
    one = tenant(max_concurrent_requests=2)
    await book.reserve(one, "r", "r-1", 10)
    await book.reserve(one, "s", "s-1", 10)
    error = await refusal(book, one, "r-2")
    assert error.quota == "max_concurrent_requests"
    assert error.retry_after_s == pytest.approx(0.5)
    await book.settle(one, {"s-1": Used(1, 1, 5.0)})
    await book.reserve(one, "r", "r-3", 10)
    assert (await refusal(book, one, "r-4")).retry_after_s == pytest.approx(2.5), "half of the mean duration"


async def test_a_router_that_renews_nothing_gives_its_reservations_back(book: QuotaBook, client: Any) -> None:
    one = tenant(tokens_per_minute=6000, max_concurrent_requests=1)
    await book.reserve(one, "dead", "dead-1", 5000)
    await pass_time(client, one, 0)
    for name in ("dead",):
        await client.zadd(key(one, "owners"), {name: 1.0})
    await book.reserve(one, "alive", "alive-1", 5500)
    usage = await book.usage(one)
    assert (usage.open_requests, usage.reserved_tokens) == (1, 5500)
    assert 500 <= await tokens_left(book, one) <= 600


async def test_a_renewal_keeps_reservations_and_counts_routers(book: QuotaBook, client: Any) -> None:
    one = tenant(tokens_per_minute=6000)
    await book.reserve(one, "r", "r-1", 100)
    await book.reserve(one, "s", "s-1", 100)
    await pass_time(client, one, 29)
    renewal = await book.renew(one, "r", 2, {"r-1": 100})
    assert (renewal.num_added, renewal.num_owners) == (0, 2)
    await pass_time(client, one, 5)
    assert (await book.renew(one, "r", 2, {"r-1": 100})).num_owners == 1
    assert (await book.usage(one)).open_requests == 1


async def test_a_router_that_was_too_late_with_its_renewal_is_charged_again(book: QuotaBook, client: Any) -> None:
    one = tenant(tokens_per_minute=6000)
    await book.reserve(one, "r", "r-1", 2000)
    await client.zadd(key(one, "owners"), {"r": 1.0})
    await book.reserve(one, "s", "s-1", 1)
    assert await tokens_left(book, one) >= 5999
    assert (await book.renew(one, "r", 2, {"r-1": 2000})).num_added == 1
    assert 3999 <= await tokens_left(book, one) <= 4100
    await book.settle(one, {"r-1": Used(10, 10, 1.0)})
    assert await tokens_left(book, one) >= 5979


async def test_a_redis_that_lost_all_gets_the_open_reservations_again(book: QuotaBook, client: Any) -> None:
    one = tenant(tokens_per_minute=6000)
    await book.reserve(one, "r", "r-1", 1000)
    await book.reserve(one, "r", "r-2", 1000)
    await client.flushall()
    assert (await book.renew(one, "r", 3, {"r-1": 1000, "r-2": 1000})).num_added == 2
    assert 4000 <= await tokens_left(book, one) <= 4100
    await book.settle(one, {"r-1": Used(100, 100, 1.0)})
    assert 4800 <= await tokens_left(book, one) <= 4900


async def test_a_settlement_without_a_reservation_charges_what_was_used_once(book: QuotaBook) -> None:
    """A router grants requests itself while Redis is away."""
    one = tenant(tokens_per_minute=6000)
    for _ in range(2):
        await book.settle(one, {"r-1": Used(500, 500, 1.0)})
    assert 5000 <= await tokens_left(book, one) <= 5100


async def test_settlements_that_arrive_together_count_as_those_that_arrive_one_by_one(book: QuotaBook) -> None:
    limits = {"tokens_per_minute": 6000, "requests_per_minute": 60}
    together, single = tenant("together", **limits), tenant("single", **limits)
    used = {"r-1": Used(10, 20, 1.0), "r-2": NOTHING, "local-1": Used(5, 5, 3.0), "never-granted": NOTHING}
    for one in (together, single):
        for number in (1, 2, 3):
            await book.reserve(one, "r", f"r-{number}", 100)
    for _ in range(2):
        await book.settle(together, used)
        for key_, value in used.items():
            await book.settle(single, {key_: value})
    found, expected = [await book.usage(one) for one in (together, single)]
    assert (found.requests, found.prompt_tokens, found.output_tokens) == (3, 15, 25)
    assert (found.open_requests, found.reserved_tokens) == (1, 100)
    assert (found.requests_left, expected.requests_left) == (56, 56)
    assert (found.requests, found.open_requests) == (expected.requests, expected.open_requests)
    assert abs((found.tokens_left or 0) - (expected.tokens_left or 0)) <= 100, "the buckets refill meanwhile"


async def test_requests_that_were_granted_elsewhere_count_as_requests(book: QuotaBook, client: Any) -> None:
    one = tenant(requests_per_minute=60)
    for number in range(10):
        await book.settle(one, {f"local-{number}": Used(1, 1, 1.0)})
    await book.settle(one, {"never-granted": NOTHING})
    assert (await book.usage(one)).requests_left == 50
    await book.renew(one, "r", 9, {f"r-{number}": 5 for number in range(1, 9)})
    assert (await book.usage(one)).requests_left == 42


async def test_debt_is_kept_until_it_is_paid(book: QuotaBook, client: Any) -> None:
    one = tenant(tokens_per_minute=100)
    await book.reserve(one, "r", "r-1", 10)
    await book.settle(one, {"r-1": Used(100_000, 0, 1.0)})
    assert await client.ttl(key(one, "quota")) > 59_000


async def test_a_renewal_that_arrives_after_the_settlement_adds_nothing(book: QuotaBook) -> None:
    one = tenant(tokens_per_minute=6000)
    await book.reserve(one, "r", "r-1", 1000)
    await book.settle(one, {"r-1": NOTHING})
    assert (await book.renew(one, "r", 2, {"r-1": 1000})).num_added == 0
    assert await tokens_left(book, one) == 6000


async def test_a_renewal_gives_back_what_a_failover_left_unsettled(book: QuotaBook) -> None:
    """The router has settled r-1; the new primary does not know. r-3 was reserved after the list was made."""
    one = tenant(tokens_per_minute=6000)
    for number in (1, 2, 3):
        await book.reserve(one, "r", f"r-{number}", 1000)
    await book.reserve(one, "s", "s-1", 500)
    await book.renew(one, "r", 3, {"r-2": 1000})
    usage = await book.usage(one)
    assert (usage.open_requests, usage.reserved_tokens) == (3, 2500)
    assert 3500 <= await tokens_left(book, one) <= 3600


async def test_limits_that_change_apply_at_once(book: QuotaBook) -> None:
    small, large = tenant(tokens_per_minute=600), tenant(tokens_per_minute=6000)
    await book.reserve(small, "r", "r-1", 600)
    await refusal(book, small, "r-2", 10)
    assert 0 <= await tokens_left(book, large) <= 100
    unlimited = tenant()
    await book.reserve(unlimited, "r", "r-3", 10**9)
    await book.settle(unlimited, {"r-3": Used(10**9, 0, 1.0)})
    assert (await book.usage(unlimited)).prompt_tokens == 10**9


async def test_a_clock_that_is_set_back_refills_nothing_and_takes_nothing(book: QuotaBook, client: Any) -> None:
    one = tenant(tokens_per_minute=6000)
    await book.reserve(one, "r", "r-1", 6000)
    await pass_time(client, one, -1000)
    assert await tokens_left(book, one) == 0
    await book.settle(one, {"r-1": Used(3000, 0, 1.0)})
    assert 3000 <= await tokens_left(book, one) <= 3100


async def test_the_tenants_of_two_meshes_and_two_tenants_are_apart(client: Any) -> None:
    first, second = QuotaBook(client, "first"), QuotaBook(client, "second")
    one = tenant(max_concurrent_requests=1)
    await first.reserve(one, "r", "r-1", 1)
    await second.reserve(one, "r", "r-1", 1)
    await first.reserve(tenant("other", max_concurrent_requests=1), "r", "r-1", 1)


async def test_a_removed_tenant_leaves_nothing(book: QuotaBook, client: Any) -> None:
    one = tenant(tokens_per_minute=100)
    await book.reserve(one, "r", "r-1", 1)
    await book.settle(one, {"r-1": Used(1, 1, 1.0)})
    await book.remove(one.tenant_id)
    assert await client.keys("*") == []


async def test_every_key_of_an_idle_tenant_expires(book: QuotaBook, client: Any) -> None:
    one = tenant(tokens_per_minute=100, requests_per_minute=5)
    await book.reserve(one, "r", "r-1", 1)
    await book.settle(one, {"r-2": Used(1, 1, 1.0)})
    for name in ("quota", "open", "owners", "settled"):
        assert 0 < await client.ttl(key(one, name)) <= 3600, name
    assert await client.ttl(key(one, "usage")) > 3600


async def test_many_routers_at_once_grant_no_more_than_the_bucket_and_one_request(book: QuotaBook) -> None:
    one = tenant(tokens_per_minute=3000)

    async def try_to(number: int) -> int:
        try:
            await book.reserve(one, f"r{number % 4}", f"r{number % 4}-{number}", 100)
        except QuotaExceeded:
            return 0
        return 100

    granted = sum(await asyncio.gather(*(try_to(number) for number in range(200))))
    assert 3000 <= granted <= 3100


async def test_a_redis_that_does_not_respond_is_unavailable(tmp_path: Path) -> None:
    nowhere = open_redis(f"unix://{tmp_path}/none.sock")
    book, one = QuotaBook(nowhere, "mesh"), tenant()
    for call in (
        book.reserve(one, "r", "r-1", 1), book.settle(one, {"r-1": NOTHING}), book.renew(one, "r", 1, {}),
        book.usage(one), book.remove("x"),
    ):  # fmt: skip
        with pytest.raises(Unavailable, match="Redis does not respond"):
            await call
    await nowhere.aclose()
