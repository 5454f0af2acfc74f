"""The admission client with a kvstore on a real gRPC server; the test responds to its Admit streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

import router.admission_client
from muxmesh.clock import ManualClock
from muxmesh.errors import InvalidRequest, ModelNotFound
from muxmesh.internal.v1 import kvstore_pb2
from muxmesh.rpc import convert
from muxmesh.rpc.channels import internal_channel
from muxmesh.scheduling_policy import FCFS
from muxmesh.step_cost import ModelCosts, StepCost
from muxmesh.types import KvDemand, LeaseRef, QueuedRequest, SchedulingState
from router.admission_client import Credit, ReportedLoad, UnitAdmission, UnitLost
from router.request_queue import SHOWN_PER_MODEL
from tests.support.fake_unit import AdmitStream, FakeKvStore, serving
from tests.support.pipeline_parts import until

DEMAND = KvDemand(10, 20, (bytes(range(16)),), 3)
Waiting = asyncio.Task[Credit]


@pytest.fixture(autouse=True)
def _reconnect_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.admission_client, "_RECONNECT_S", 0.0)


@asynccontextmanager
async def client_of(address: str) -> AsyncIterator[UnitAdmission]:
    async with internal_channel(address) as channel:
        admission = UnitAdmission("unit0", "router-1", channel, ManualClock(1000.0), FCFS)
        running = asyncio.create_task(admission.run())
        try:
            yield admission
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running


@dataclass
class Setup:
    kvstore: FakeKvStore
    admission: UnitAdmission
    stream: AdmitStream


@pytest_asyncio.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    """A client whose stream is open and has sent its hello."""
    kvstore = FakeKvStore()
    async with serving(tmp_path / "kv.sock", kvstore.services) as address, client_of(address) as admission:
        stream = await kvstore.stream()
        assert (await stream.next("hello")).router == "router-1"
        await admission.connected.wait()
        yield Setup(kvstore, admission, stream)


def waiting(admission: UnitAdmission, arrived_at_s: float = 0.0, model: str = "m", priority: int = 0) -> Waiting:
    """A request that waits for a credit."""
    scheduling = SchedulingState(priority, arrived_at_s)
    return asyncio.create_task(admission.wait_for_credit(model, "t", scheduling, DEMAND))


async def ended(task: Waiting) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def credit_for(entry_id: int, lease_id: int = 7) -> kvstore_pb2.Credit:
    return kvstore_pb2.Credit(
        entry_id=entry_id,
        lease=convert.ref_to_wire(LeaseRef(lease_id, 2)),
        prefill=kvstore_pb2.WorkerRef(name="p.1", address="unix:p"),
        decode=kvstore_pb2.WorkerRef(name="d.1", address="unix:d"),
        decision=5,
        num_overtaken=4,
        scheduling=convert.scheduling_to_wire(SchedulingState(-1, 3.0, 0.5, 2.0)),
    )


async def test_a_connected_unit_has_told_the_fingerprints_of_its_weights(setup: Setup) -> None:
    assert setup.admission.fingerprints == setup.kvstore.fingerprints


async def test_the_fingerprints_of_a_restarted_unit_replace_those_before(setup: Setup) -> None:
    setup.kvstore.fingerprints = {"m": "new weights"}
    setup.stream.end()
    await setup.kvstore.stream()
    await until(lambda: setup.admission.fingerprints == {"m": "new weights"})


async def test_a_queued_request_is_shown_and_gets_its_credit(setup: Setup) -> None:
    request = waiting(setup.admission, 3.0)
    offer = await setup.stream.next("offer")
    assert convert.queued_from_wire(offer) == QueuedRequest(1, "m", SchedulingState(0, 3.0), DEMAND, "t")
    assert setup.admission.num_queued("m") == 1
    setup.stream.send(credit=credit_for(1))
    assert await request == Credit(
        LeaseRef(7, 2), "p.1", "unix:p", "d.1", "unix:d", 5, 4, SchedulingState(-1, 3.0, 0.5, 2.0)
    )
    assert setup.admission.num_queued("m") == 0


async def test_a_unit_sees_a_limited_number_of_the_best_requests_of_each_model(setup: Setup) -> None:
    requests = [waiting(setup.admission, float(number)) for number in range(SHOWN_PER_MODEL + 2)]
    other = waiting(setup.admission, model="n")
    shown = [await setup.stream.next("offer") for _ in range(SHOWN_PER_MODEL + 1)]
    assert [offer.entry_id for offer in shown] == [*range(1, SHOWN_PER_MODEL + 1), SHOWN_PER_MODEL + 3]
    setup.stream.send(credit=credit_for(2))
    await requests[1]
    assert (await setup.stream.next("offer")).entry_id == SHOWN_PER_MODEL + 1, "one has left: the next one is shown"
    urgent = waiting(setup.admission, priority=-1)
    assert (await setup.stream.next("offer")).entry_id == SHOWN_PER_MODEL + 4, "a better one is shown at once"
    for request in (*requests, other, urgent):
        await ended(request)


@pytest.mark.parametrize(
    ("field", "error", "message"),
    [
        ("stopping.max_new_tokens", InvalidRequest, r"^stopping\.max_new_tokens: too many$"),
        ("model", ModelNotFound, "^model: too many$"),
    ],
)
async def test_a_refused_request_raises_the_unit_s_problem(
    setup: Setup, field: str, error: type[Exception], message: str
) -> None:
    request = waiting(setup.admission)
    await setup.stream.next("offer")
    setup.stream.send(refused=kvstore_pb2.RequestRefused(entry_id=1, field=field, problem="too many"))
    with pytest.raises(error, match=message):
        await request
    assert setup.admission.num_queued("m") == 0


async def test_a_request_that_stops_waiting_is_withdrawn(setup: Setup) -> None:
    request = waiting(setup.admission)
    await setup.stream.next("offer")
    await ended(request)
    assert await setup.stream.next("withdraw") == 1
    assert setup.admission.num_queued("m") == 0


async def test_a_credit_for_a_withdrawn_request_is_returned(setup: Setup) -> None:
    request = waiting(setup.admission)
    await setup.stream.next("offer")
    await ended(request)
    await setup.stream.next("withdraw")
    setup.stream.send(credit=credit_for(1))
    assert convert.ref_from_wire(await setup.stream.next("return_credit")) == LeaseRef(7, 2)


async def test_a_credit_that_arrives_while_its_request_is_cancelled_is_returned(setup: Setup) -> None:
    request = waiting(setup.admission)
    await setup.stream.next("offer")
    setup.admission._on_response(kvstore_pb2.AdmitResponse(credit=credit_for(1)))  # the request has not run since
    await ended(request)
    assert convert.ref_from_wire(await setup.stream.next("return_credit")) == LeaseRef(7, 2)


async def test_an_unused_credit_is_returned(setup: Setup) -> None:
    request = waiting(setup.admission)
    await setup.stream.next("offer")
    setup.stream.send(credit=credit_for(1, lease_id=9))
    setup.admission.return_credit(await request)
    assert convert.ref_from_wire(await setup.stream.next("return_credit")) == LeaseRef(9, 2)


async def test_an_unknown_entry_is_ignored_when_it_is_refused(setup: Setup) -> None:
    setup.stream.send(refused=kvstore_pb2.RequestRefused(entry_id=99, field="model", problem="gone"))
    request = waiting(setup.admission)
    await setup.stream.next("offer")
    setup.stream.send(credit=credit_for(1))
    await request


async def test_step_costs_are_those_that_the_unit_reported_last(setup: Setup) -> None:
    def costs(base_s: float) -> ModelCosts:
        return ModelCosts(StepCost(base_s, 0.25, 0.5, 1.0, 2.0), StepCost(base_s, 0.0, 0.125, 4.0, 90.0))

    assert setup.admission.costs == {}
    for base_s, model in ((1.0, "m"), (2.0, "m"), (3.0, "n")):
        prefill, decode = convert.cost_to_wire(costs(base_s).prefill), convert.cost_to_wire(costs(base_s).decode)
        cost = kvstore_pb2.ModelCost(model=model, prefill=prefill, decode=decode)
        setup.stream.send(costs=kvstore_pb2.UnitCosts(models=[cost]))
    await until(lambda: "n" in setup.admission.costs)
    assert setup.admission.costs == {"m": costs(2.0), "n": costs(3.0)}
    assert {model: one.costs for model, one in setup.admission.unloaded.items()} == setup.admission.costs


async def test_the_loads_of_other_routers_are_those_of_the_last_report_until_the_unit_is_lost(setup: Setup) -> None:
    assert setup.admission.loads == {}
    for number in (3, 2):
        load = kvstore_pb2.ModelLoad(
            model="m", is_asleep=True, num_sequences=number, prefill_tokens=4, prefill_context=5
        )
        setup.stream.send(loads=kvstore_pb2.UnitLoads(models=[load]))
    await until(lambda: setup.admission.loads == {"m": ReportedLoad(True, 2, 4, 5)})
    setup.stream.end()
    await until(lambda: setup.admission.loads == {})


async def test_a_request_that_leaves_a_lost_unit_is_not_shown_to_the_next_one(setup: Setup) -> None:
    leaving = asyncio.create_task(
        setup.admission.wait_for_credit("m", "t", SchedulingState(0, 1.0), DEMAND, leaves_when_lost=True)
    )
    staying = waiting(setup.admission, 2.0)
    assert [(await setup.stream.next("offer")).entry_id for _ in range(2)] == [1, 2]
    assert setup.admission.num_before("m", "t", SchedulingState(0, 2.5)) == 2
    setup.stream.end()
    with pytest.raises(UnitLost, match=r"^the connection to unit unit0 broke$"):
        await leaving
    stream = await setup.kvstore.stream()
    await stream.next("hello")
    assert (await stream.next("offer")).entry_id == 2
    await ended(staying)


async def test_queued_requests_are_shown_again_after_the_stream_broke(setup: Setup) -> None:
    requests = [waiting(setup.admission, float(number)) for number in range(2)]
    assert [(await setup.stream.next("offer")).entry_id for _ in requests] == [1, 2]
    setup.stream.send(credit=credit_for(1))
    await requests[0]
    setup.stream.end()
    stream = await setup.kvstore.stream()
    assert (await stream.next("hello")).router == "router-1"
    assert (await stream.next("offer")).entry_id == 2
    stream.send(credit=credit_for(2))
    assert (await requests[1]).prefill_worker == "p.1"


async def test_a_request_survives_the_restart_of_its_unit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before, after, socket = FakeKvStore(), FakeKvStore(), tmp_path / "kv.sock"
    async with client_of(f"unix:{socket}") as admission:
        early = waiting(admission)
        await asyncio.sleep(0)
        assert not admission.connected.is_set() and admission.num_queued("m") == 1
        async with serving(socket, before.services):
            stream = await before.stream()
            await stream.next("hello")
            await stream.next("offer")
        await until(lambda: not admission.connected.is_set())
        assert "unit unit0 is unreachable" in caplog.text
        late = waiting(admission, 5.0)
        async with serving(socket, after.services):
            stream = await after.stream()
            await stream.next("hello")
            for request in (early, late):
                entry_id = (await stream.next("offer")).entry_id
                stream.send(credit=credit_for(entry_id, lease_id=entry_id))
                assert (await request).lease.lease_id == entry_id


async def test_a_unit_that_cannot_be_reached_is_explained_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router.admission_client, "_LOOK_EVERY_S", 0.001)
    kvstore, socket = FakeKvStore(), tmp_path / "kv.sock"

    def lines() -> list[str]:
        return [one.getMessage() for one in caplog.records if "unit0 is not connected yet" in one.getMessage()]

    async with client_of(f"unix:{socket}") as admission:
        await until(lambda: len(lines()) > 0)
        assert "No such file or directory" in lines()[0]
        async with serving(socket, kvstore.services):
            await admission.connected.wait()
            shown = lines()
            await asyncio.sleep(0.1)
            assert lines() == shown
    assert len(shown) == len(set(shown)), "each reason once"


async def test_a_request_that_ends_while_the_unit_is_lost_is_not_shown_to_the_next_one(tmp_path: Path) -> None:
    kvstore, socket = FakeKvStore(), tmp_path / "kv.sock"
    async with client_of(f"unix:{socket}") as admission:
        withdrawn, kept = waiting(admission, 1.0), waiting(admission, 2.0)
        await asyncio.sleep(0)
        await ended(withdrawn)
        async with serving(socket, kvstore.services):
            stream = await kvstore.stream()
            await stream.next("hello")
            assert (await stream.next("offer")).entry_id == 2
            await ended(kept)
