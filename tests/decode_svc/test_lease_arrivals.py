import asyncio

import pytest

from decode_svc.lease_arrivals import LeaseArrivals
from muxmesh.errors import WorkerLost
from muxmesh.types import Lease, LeaseRef


def no_orphan(lease: Lease) -> None:
    pytest.fail(f"{lease} is no orphan")


LEASE = Lease(LeaseRef(1, 3), "m", (0, 1))


async def test_a_call_waits_for_its_lease() -> None:
    arrivals = LeaseArrivals(no_orphan)
    call = asyncio.create_task(arrivals.wait_for(1))
    await asyncio.sleep(0)
    arrivals.lease_arrived(LEASE)
    assert await call == LEASE


async def test_a_lease_waits_for_its_call() -> None:
    arrivals = LeaseArrivals(no_orphan)
    arrivals.lease_arrived(LEASE)
    assert await arrivals.wait_for(1) == LEASE


async def test_a_lease_without_a_call_is_an_orphan() -> None:
    orphans: asyncio.Queue[Lease] = asyncio.Queue()
    LeaseArrivals(orphans.put_nowait).lease_arrived(LEASE)
    async with asyncio.timeout(5):
        assert await orphans.get() == LEASE


async def test_a_call_after_its_lease_was_given_up_is_told_so() -> None:
    given_up = asyncio.Event()
    arrivals = LeaseArrivals(lambda lease: given_up.set())
    arrivals.lease_arrived(LEASE)
    async with asyncio.timeout(5):
        await given_up.wait()
    with pytest.raises(WorkerLost, match="came too late"):
        await arrivals.wait_for(1)


async def test_a_lease_after_a_cancelled_call_is_an_orphan() -> None:
    orphans: asyncio.Queue[Lease] = asyncio.Queue()
    arrivals = LeaseArrivals(orphans.put_nowait)
    call = asyncio.create_task(arrivals.wait_for(1))
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    arrivals.lease_arrived(LEASE)
    async with asyncio.timeout(5):
        assert await orphans.get() == LEASE


async def test_a_lease_that_arrives_in_the_moment_of_the_cancel_is_an_orphan() -> None:
    orphans: asyncio.Queue[Lease] = asyncio.Queue()
    arrivals = LeaseArrivals(orphans.put_nowait)
    call = asyncio.create_task(arrivals.wait_for(1))
    await asyncio.sleep(0)
    arrivals.lease_arrived(LEASE)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    async with asyncio.timeout(5):
        assert await orphans.get() == LEASE
