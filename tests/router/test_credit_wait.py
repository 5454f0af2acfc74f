"""Sequences that wait for credits of two units, in virtual time. Units are fakes; the choice is the router's own."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from muxmesh.errors import InvalidRequest
from muxmesh.types import EngineRequest, KvDemand, LeaseRef, Sampling, SchedulingState, Stopping, Waits
from router.admission_client import Credit, ReportedLoad, UnitLost
from router.credit_wait import RECHOOSE_EVERY_S, CreditWait
from router.expected_work import ExpectedWork
from router.unit_choice import ChoiceReason
from router.unit_link import PlacedModel, UnitLink
from router.units import Units
from tests.support.pipeline_parts import IDENTITY, served_model
from tests.support.virtual_time import VirtualClock, run_virtually

REQUEST = EngineRequest("r", "m", tuple(range(40)), Sampling(), Stopping(300), SchedulingState(0, 7.0), tenant="t")
SLOTS = served_model().config.max_num_seqs


class FakeAdmission:
    """A unit that issues credits when it is told. Records the requests that were queued there, and their arrivals."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.connected = asyncio.Event()
        self.connected.set()
        self.costs: dict[str, Any] = {}
        self.loads: dict[str, ReportedLoad] = {}
        self.fingerprints: dict[str, str] = {"m": "w"}
        self.waiting: list[asyncio.Future[Credit]] = []
        self.arrivals: list[float] = []
        self.num_issued = 0
        self.returned: list[int] = []

    def num_queued(self, model: str) -> int:
        return len(self.waiting)

    def num_before(self, model: str, tenant: str, scheduling: SchedulingState, weight: float = 1.0) -> int:
        return 0

    async def wait_for_credit(
        self,
        model: str,
        tenant: str,
        scheduling: SchedulingState,
        demand: KvDemand,
        tenant_weight: float = 1.0,
        leaves_when_lost: bool = False,
    ) -> Credit:
        assert leaves_when_lost
        self.arrivals.append(scheduling.arrived_at_s)
        future: asyncio.Future[Credit] = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        try:
            return await future
        finally:
            self.waiting.remove(future)

    def issue(self) -> None:
        """Issues a credit to the request that was queued first."""
        self.num_issued += 1
        lease, waits = LeaseRef(self.num_issued, 1), Waits(slot_s=1.0)
        self.waiting[0].set_result(Credit(lease, "p", "", "d", "", 1, 0, REQUEST.scheduling, waits))

    def return_credit(self, credit: Credit) -> None:
        self.returned.append(credit.lease.lease_id)

    def lose(self) -> None:
        self.connected.clear()
        for future in self.waiting:
            future.set_exception(UnitLost("gone"))


class Setup:
    """Units named by the letters of ``names``; all serve model m."""

    def __init__(self, names: str = "ab") -> None:
        self.admissions = {name: FakeAdmission(name) for name in names}
        placed = {"m": PlacedModel(served_model().config, IDENTITY)}
        self.links = {
            name: UnitLink(name, cast(Any, one), cast(Any, None), cast(Any, None), dict(placed), ExpectedWork(0.0))
            for name, one in self.admissions.items()
        }
        self.units = Units(self.links.values())
        self.wait = CreditWait(self.units, VirtualClock())
        self.credits: list[tuple[str, Credit]] = []

    async def serve(self, request: EngineRequest = REQUEST) -> None:
        """Waits for a credit and uses it for a moment."""
        async with self.wait.credited(request) as credited:
            assert self.num_assigned() == {credited.chosen.link.name: 1}
            self.credits.append((credited.chosen.link.name, credited.credit))
            credited.prefilled(5)
            assert credited.chosen.link.assigned.prefill_s == 0.0
            await asyncio.sleep(1.0)

    def num_assigned(self) -> dict[str, int]:
        return {name: num for name, link in self.links.items() if (num := link.assigned.num("m"))}

    def fill(self, name: str, decode_s: float = 100.0) -> list[Any]:
        """Lets all slots of a unit be taken."""
        assigned = self.links[name].assigned
        sequences = [assigned.add("m", 0.0, decode_s) for _ in range(SLOTS)]
        for one in sequences:
            assigned.credited(one)
        return sequences


def test_a_credit_is_returned_when_its_block_ends() -> None:
    async def run() -> None:
        setup = Setup()
        serving = asyncio.create_task(setup.serve())
        await asyncio.sleep(0.1)
        assert setup.num_assigned() == {"a": 1}, "a sequence that waits for a credit counts"
        setup.admissions["a"].issue()
        await serving
        assert setup.num_assigned() == {}
        assert setup.admissions["a"].returned == [1]
        assert [(name, credit.waits) for name, credit in setup.credits] == [("a", Waits(slot_s=1.0))]
        assert setup.units.num_cached_tokens == {("a", ChoiceReason.LOAD): 5}

    run_virtually(run())


def test_requests_queued_at_a_lost_unit_move_at_once_and_keep_their_arrival() -> None:
    async def run() -> None:
        setup = Setup()
        first, second = (asyncio.create_task(setup.serve()) for _ in range(2))
        await asyncio.sleep(0.2)
        assert [len(one.waiting) for one in setup.admissions.values()] == [1, 1]
        setup.admissions["a"].lose()
        await asyncio.sleep(0.01)
        assert [len(one.waiting) for one in setup.admissions.values()] == [0, 2]
        assert setup.admissions["b"].arrivals == [7.0, 7.0] and setup.num_assigned() == {"b": 2}
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        setup.admissions["b"].issue()
        await first
        ((name, credit),) = setup.credits
        assert name == "b" and credit.waits.slot_s == 1.0
        assert credit.waits.worker_s == pytest.approx(0.2), "what it has waited at the lost unit"

    run_virtually(run())


def test_at_the_only_unit_a_request_waits_until_it_is_back() -> None:
    async def run() -> None:
        setup = Setup("a")
        serving = asyncio.create_task(setup.serve())
        await asyncio.sleep(0.2)
        setup.admissions["a"].lose()
        await asyncio.sleep(5 * RECHOOSE_EVERY_S)
        assert len(setup.admissions["a"].waiting) == 1 and not serving.done()
        setup.admissions["a"].connected.set()
        setup.admissions["a"].issue()
        await serving
        assert len(setup.admissions["a"].arrivals) == 2

    run_virtually(run())


def test_a_request_moves_to_a_unit_that_idles_once() -> None:
    async def run() -> None:
        setup = Setup()
        taken = setup.fill("a")
        setup.admissions["b"].connected.clear()
        serving = asyncio.create_task(setup.serve())
        await asyncio.sleep(0.1)
        assert len(setup.admissions["a"].waiting) == 1
        setup.admissions["b"].connected.set()
        await asyncio.sleep(RECHOOSE_EVERY_S)
        assert [len(one.waiting) for one in setup.admissions.values()] == [0, 1]
        for one in taken:
            setup.links["a"].assigned.remove(one)
        await asyncio.sleep(3 * RECHOOSE_EVERY_S)
        assert [len(one.waiting) for one in setup.admissions.values()] == [0, 1], "it would gain nothing"
        setup.admissions["b"].issue()
        await serving
        ((name, credit),) = setup.credits
        assert name == "b" and credit.waits.order_s == pytest.approx(RECHOOSE_EVERY_S)

    run_virtually(run())


def test_only_as_many_requests_move_as_the_other_unit_has_slots() -> None:
    async def run() -> None:
        setup = Setup()
        setup.fill("a")
        setup.links["b"].admission.connected.clear()
        serving = [asyncio.create_task(setup.serve()) for _ in range(2 * SLOTS)]
        await asyncio.sleep(0.1)
        setup.links["b"].admission.connected.set()
        await asyncio.sleep(2 * RECHOOSE_EVERY_S)
        assert [len(one.waiting) for one in setup.admissions.values()] == [SLOTS, SLOTS]
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        assert setup.num_assigned() == {"a": SLOTS}

    run_virtually(run())


def test_a_credit_that_arrives_while_its_request_is_cancelled_is_returned() -> None:
    async def run() -> None:
        setup = Setup()
        serving = asyncio.create_task(setup.serve())
        await asyncio.sleep(0.1)
        setup.admissions["a"].issue()
        await asyncio.sleep(0)  # the task that waits for the credit has it, the request's own does not
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        assert setup.admissions["a"].returned == [1] and setup.num_assigned() == {}

    run_virtually(run())


def test_a_unit_that_is_chosen_before_is_used_unless_it_is_lost() -> None:
    async def run(is_lost: bool) -> str:
        setup = Setup()
        first = setup.units.choose(REQUEST)
        assert first.link.name == "a"
        if is_lost:
            setup.links["a"].admission.connected.clear()
        else:
            setup.links["a"].assigned.add("m", 0.0, 1.0)  # b would be chosen now
        serving = asyncio.create_task(anext(aiter_of(setup, first)))
        await asyncio.sleep(0.1)
        (name,) = (one.name for one in setup.admissions.values() if one.waiting)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        return name

    async def aiter_of(setup: Setup, first: Any) -> Any:
        async with setup.wait.credited(REQUEST, first) as credited:
            yield credited

    assert run_virtually(run(False)) == "a"
    assert run_virtually(run(True)) == "b"


def test_a_refusal_is_the_request_s_own() -> None:
    async def run() -> None:
        setup = Setup()
        serving = asyncio.create_task(setup.serve())
        await asyncio.sleep(0.1)
        setup.admissions["a"].waiting[0].set_exception(InvalidRequest("stopping.max_new_tokens", "too many"))
        with pytest.raises(InvalidRequest):
            await serving
        assert setup.num_assigned() == {}

    run_virtually(run())
