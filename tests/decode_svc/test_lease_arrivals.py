"""Calls and leases that wait for each other, on a loop whose time jumps."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from decode_svc.lease_arrivals import ORPHAN_GRACE_S, LeaseArrivals
from muxmesh.errors import WorkerLost
from muxmesh.types import Lease, LeaseRef
from tests.support.virtual_time import run_virtually

LEASE = Lease(LeaseRef(1, 3), "m", (0, 1))


class Arrivals(LeaseArrivals):
    """Arrivals that keep their orphans."""

    def __init__(self) -> None:
        self.orphans: list[Lease] = []
        super().__init__(self.orphans.append)

    async def waiting_call(self) -> "asyncio.Task[Lease]":
        """A call that waits for `LEASE`."""
        call = asyncio.create_task(self.wait_for(1))
        await asyncio.sleep(0)
        return call


def after_grace() -> Coroutine[Any, Any, None]:
    return asyncio.sleep(2 * ORPHAN_GRACE_S)


@pytest.mark.parametrize("call_is_first", [True, False])
def test_a_call_gets_its_lease_whichever_arrives_first(call_is_first: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        arrivals = Arrivals()
        if call_is_first:
            call = await arrivals.waiting_call()
            arrivals.lease_arrived(LEASE)
            assert await call == LEASE
        else:
            arrivals.lease_arrived(LEASE)
            assert await arrivals.wait_for(1) == LEASE
        await after_grace()
        assert arrivals.orphans == []

    run_virtually(scenario())
    assert not caplog.records, "no timer expired"


def test_a_call_gets_no_lease_but_its_own() -> None:
    async def scenario() -> None:
        arrivals = Arrivals()
        call = await arrivals.waiting_call()
        other = Lease(LeaseRef(2, 3), "m", (5,))
        arrivals.lease_arrived(other)
        await after_grace()
        assert arrivals.orphans == [other] and not call.done()
        arrivals.lease_arrived(LEASE)
        assert await call == LEASE

    run_virtually(scenario())


def test_a_lease_without_a_call_is_an_orphan_when_the_grace_has_passed() -> None:
    async def scenario() -> None:
        arrivals = Arrivals()
        arrivals.lease_arrived(LEASE)
        await asyncio.sleep(0.99 * ORPHAN_GRACE_S)
        assert arrivals.orphans == []
        await asyncio.sleep(0.02 * ORPHAN_GRACE_S)
        assert arrivals.orphans == [LEASE]

    run_virtually(scenario())


def test_a_call_whose_lease_was_given_up_fails() -> None:
    async def scenario() -> None:
        arrivals = Arrivals()
        arrivals.lease_arrived(LEASE)
        await after_grace()
        with pytest.raises(WorkerLost, match="lease 1 was given up"):
            await arrivals.wait_for(1)

    run_virtually(scenario())


def test_a_lease_that_arrives_after_its_call_was_cancelled_is_an_orphan() -> None:
    async def scenario() -> None:
        arrivals = Arrivals()
        call = await arrivals.waiting_call()
        call.cancel()
        await asyncio.wait([call])
        arrivals.lease_arrived(LEASE)
        await after_grace()
        assert arrivals.orphans == [LEASE]

    run_virtually(scenario())


@pytest.mark.parametrize("lease_is_first", [True, False])
def test_a_lease_that_arrives_together_with_the_cancel_of_its_call_is_an_orphan_once(lease_is_first: bool) -> None:
    async def scenario() -> None:
        arrivals = Arrivals()
        call = await arrivals.waiting_call()
        steps: list[Callable[[], object]] = [lambda: arrivals.lease_arrived(LEASE), call.cancel]
        for step in steps if lease_is_first else steps[::-1]:
            step()
        await asyncio.wait([call])
        await after_grace()
        assert call.cancelled() and arrivals.orphans == [LEASE]

    run_virtually(scenario())
