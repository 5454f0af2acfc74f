"""The gRPC service of a unit over a unix socket: routers' streams, workers' calls, errors and status."""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from kvstore.grant_page import Word
from kvstore.grant_table import GrantTable
from kvstore.leases import LeaseState
from kvstore.memory_reclaim import RECLAIM_AFTER_S, RECLAIM_EVERY_S
from kvstore.preemption_costs import KvCosts
from kvstore.service import KvStoreService
from kvstore.unit import CREDIT_TTL_S, Unit
from kvstore.unit_model import UnitModel
from muxmesh.block_hashes import block_hashes
from muxmesh.clock import ManualClock
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import UnitConfig
from muxmesh.errors import InternalError, InvalidRequest, LeaseLost, MeshError, Overloaded, WorkerLost
from muxmesh.fairness import Fairness
from muxmesh.internal.v1 import kvstore_pb2
from muxmesh.rpc import convert
from muxmesh.rpc.status_codes import from_rpc_error
from muxmesh.scheduling_policy import FCFS
from muxmesh.step_cost import COSTS_EVERY_S, StepCost, context_of
from muxmesh.types import SWAP_PAGE_BYTES, KvDemand, Lease, LeaseRef, QueuedRequest, Role, SchedulingState
from tests.kvstore.small_unit import (
    SHAPES,
    SLAB_BYTES,
    attach_ready,
    make_unit,
    queued,
    slab_tokens,
)
from tests.support.served_unit import FINGERPRINTS, LONGEST_WAIT_S, RouterStream, ServedUnit, served
from tests.support.virtual_time import VirtualClock, run_virtually
from worker.attachment import Attachment, attach
from worker.lease_client import LeaseClient, LeaseStandings

FIRST = SchedulingState(0, 0.0)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest_asyncio.fixture
async def served_unit(tmp_path: Path, clock: ManualClock) -> AsyncIterator[ServedUnit]:
    unit = make_unit(num_slabs=4, max_num_seqs=4, swap_bytes=4 * SWAP_PAGE_BYTES)
    async with served(tmp_path, unit, clock) as running:
        yield running
        unit.check_integrity()


class LeaseWatch:
    """A WatchLeases stream, as a decode worker holds it."""

    def __init__(self, served_unit: ServedUnit, worker: str) -> None:
        self._call: Any = served_unit.stub.WatchLeases(kvstore_pb2.WatchLeasesRequest(owner=worker))

    async def next(self) -> Lease | int:
        """A lease that has arrived, or the id of one to pre-empt."""
        response = await asyncio.wait_for(self._call.read(), LONGEST_WAIT_S)
        assert isinstance(response, kvstore_pb2.WatchLeasesResponse), response
        return convert.lease_from_wire(response.arrived) if response.HasField("arrived") else response.preempt.lease_id

    def cancel(self) -> None:
        self._call.cancel()


class Workers:
    """A ready prefill and a ready decode worker of one model, and their calls."""

    def __init__(self, channel: grpc.aio.Channel, model: str, prefill: Attachment, decode: Attachment) -> None:
        self.model = model
        self.prefill_attachment, self.decode_attachment = prefill, decode
        self.prefill_name, self.decode_name = prefill.worker, decode.worker
        self.prefill, self.decode = LeaseClient(channel, prefill.worker), LeaseClient(channel, decode.worker)

    @classmethod
    async def of(cls, served_unit: ServedUnit, model: str = "a") -> "Workers":
        return cls(served_unit.channel, model, *await served_unit.attach_ready(model))

    async def decoding(self, router: RouterStream, entry_id: int, num_tokens: int, arrived_at_s: float = 0.0) -> Lease:
        """A lease of the decode worker."""
        router.offer(queued(entry_id, self.model, num_tokens, arrived_at_s=arrived_at_s))
        credit = await router.credit()
        lease = await self.prefill.acquire(convert.ref_from_wire(credit.lease))
        await self.prefill.move(lease.ref, self.decode_name, num_tokens, ())
        return Lease(LeaseRef(lease.ref.lease_id, lease.ref.epoch + 1), self.model, lease.block_ids, num_tokens)

    async def swapped(self, router: RouterStream, entry_id: int, num_tokens: int) -> Lease:
        lease = await self.decoding(router, entry_id, num_tokens)
        await self.decode.begin_swap_out(lease.ref, SWAP_PAGE_BYTES)
        await self.decode.finish_swap_out(lease.ref, ())
        return lease


async def status_of(served_unit: ServedUnit) -> Any:
    return (await served_unit.stub.GetUnitStatus(kvstore_pb2.GetUnitStatusRequest())).unit


# Routers


async def test_a_credit_names_the_lease_the_workers_and_the_decision(served_unit: ServedUnit) -> None:
    workers, router = await Workers.of(served_unit), served_unit.router()
    request = QueuedRequest(5, "a", SchedulingState(-1, 7.0, 0.5, 2.0, 0.0, 1.0), KvDemand(8, 8))
    router.offer(request)
    credit = await router.credit()
    assert (credit.entry_id, credit.decision, credit.num_overtaken) == (5, 1, 0)
    assert (credit.prefill.name, credit.prefill.address) == (workers.prefill_name, "unix:prefill")
    assert (credit.decode.name, credit.decode.address) == (workers.decode_name, "unix:decode")
    assert convert.scheduling_from_wire(credit.scheduling) == request.scheduling
    (lease,) = served_unit.unit.leases.of_owner("r#1")
    assert convert.ref_from_wire(credit.lease) == lease.ref


async def test_a_request_gets_its_credit_when_the_workers_become_ready(served_unit: ServedUnit) -> None:
    router = served_unit.router()
    router.offer(queued(1))
    await router.no_credit()
    await served_unit.attach_ready("a")
    assert (await router.credit()).entry_id == 1


async def test_requests_of_two_routers_form_one_queue(served_unit: ServedUnit) -> None:
    workers, first, second = await Workers.of(served_unit), served_unit.router(), served_unit.router()
    leases = [await workers.decoding(first, entry_id, 8) for entry_id in range(4)]
    first.offer(queued(5, arrived_at_s=2.0))
    await first.no_credit()
    second.offer(queued(5, arrived_at_s=1.0))
    await second.no_credit()
    await workers.decode.release(leases[0].ref, ())
    assert (await second.credit()).num_overtaken == 0
    await workers.decode.release(leases[1].ref, ())
    assert (await first.credit()).entry_id == 5


async def test_a_request_that_the_unit_never_serves_is_refused_by_its_field(served_unit: ServedUnit) -> None:
    router = served_unit.router()
    router.offer(queued(3, "unknown"))
    assert await router.refused() == (3, "model", "'unknown' is not served by this unit; it serves: a, b, c")
    router.offer(queued(4, num_tokens=10**6))
    capacity = 4 * slab_tokens(served_unit.unit, "a")
    problem = f"prompt and longest output are 1000000 tokens; the KV pool holds {capacity}"
    assert await router.refused() == (4, "stopping.max_new_tokens", problem)


async def test_a_withdrawn_request_gets_no_credit(served_unit: ServedUnit) -> None:
    router = served_unit.router()
    router.offer(queued(1))
    router.send(withdraw=1)
    await router.no_credit()
    await Workers.of(served_unit)
    router.offer(queued(2))
    assert (await router.credit()).entry_id == 2


async def test_a_returned_credit_frees_its_blocks(served_unit: ServedUnit) -> None:
    await Workers.of(served_unit)
    router = served_unit.router()
    router.offer(queued(1))
    credit = await router.credit()
    router.send(return_credit=credit.lease)
    await router.no_credit()
    assert len(served_unit.unit.leases) == 0


async def test_a_credit_cannot_be_returned_once_a_worker_has_acquired_it(served_unit: ServedUnit) -> None:
    workers, router = await Workers.of(served_unit), served_unit.router()
    router.offer(queued(1))
    credit = await router.credit()
    lease = await workers.prefill.acquire(convert.ref_from_wire(credit.lease))
    router.send(return_credit=credit.lease)
    await router.no_credit()
    assert served_unit.unit.leases.of_owner(workers.prefill_name) == [lease]


async def test_a_router_cannot_return_the_credit_of_another(served_unit: ServedUnit) -> None:
    await Workers.of(served_unit)
    owner, other = served_unit.router(), served_unit.router()
    owner.offer(queued(1))
    credit = await owner.credit()
    other.send(return_credit=credit.lease)
    await other.no_credit()
    assert len(served_unit.unit.leases) == 1


@pytest.mark.parametrize("ending", [RouterStream.half_close, RouterStream.cancel])
async def test_the_end_of_a_stream_drops_its_requests_and_credits_and_keeps_its_leases(
    served_unit: ServedUnit, ending: Any
) -> None:
    workers, lost, other = await Workers.of(served_unit), served_unit.router(), served_unit.router()
    for entry_id in range(3):
        await workers.decoding(lost, entry_id, 8)
    lost.offer(queued(3))
    await lost.credit()
    lost.offer(queued(4))
    await lost.no_credit()
    other.offer(queued(5, arrived_at_s=9.0))
    await other.no_credit()
    ending(lost)
    assert (await other.credit()).entry_id == 5
    assert served_unit.unit.leases.count_by_owner()[workers.decode_name] == 3
    assert served_unit.unit.admission.count("a") == 0


async def test_a_half_closed_stream_ends_regularly(served_unit: ServedUnit) -> None:
    router = served_unit.router()
    await router.no_credit()
    router.half_close()
    with pytest.raises(EOFError):
        await router.next()


@pytest.mark.parametrize("message", [None, {"withdraw": 1}, {"offer": convert.queued_to_wire(queued(1))}])
async def test_a_stream_without_a_hello_is_refused(served_unit: ServedUnit, message: dict[str, Any] | None) -> None:
    router = served_unit.router(says_hello=False)
    if message is None:
        router.half_close()
    else:
        router.send(**message)
    with pytest.raises(InvalidRequest, match="hello: has to be the first message of the stream"):
        await router.next()


async def test_a_message_that_cannot_be_parsed_ends_its_stream_by_an_error(served_unit: ServedUnit) -> None:
    bad_tenant = kvstore_pb2.AdmitRequest(offer=kvstore_pb2.QueuedRequest(tenant="??")).SerializeToString()
    raw: Any = served_unit.channel.stream_stream("/muxmesh.internal.v1.KvStoreService/Admit")

    async def messages() -> AsyncIterator[bytes]:
        yield kvstore_pb2.AdmitRequest(hello=kvstore_pb2.RouterHello(router="r")).SerializeToString()
        yield bad_tenant.replace(b"??", b"\xff\xff")

    call = raw(messages())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidRequest)
    assert (error.field, error.problem) == ("offer.tenant", "is not valid UTF-8")


async def test_a_decision_is_logged_with_its_reason_if_that_is_configured(
    tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvstore.service")
    async with served(tmp_path, make_unit(), clock, trace=True) as running:
        await Workers.of(running)
        router = running.router("router0")
        clock.advance(3.0)
        router.offer(queued(5, priority=2, arrived_at_s=1.0))
        await router.credit()
    assert "decision 1: request 5 of router0#1 for a overtakes 0: fcfs, priority 2: waited 2 s" in caplog.messages


async def test_requests_that_are_overtaken_are_counted(tmp_path: Path, clock: ManualClock) -> None:
    one_at_a_time = {"a": UnitModel(SHAPES["a"], 1, 512)}
    unit = Unit(4 * SLAB_BYTES, SLAB_BYTES, one_at_a_time, policy=replace(FCFS, name="sjf"))
    async with served(tmp_path, unit, clock) as running:
        router = running.router()
        for entry_id, work_s in ((1, 50.0), (2, 1.0)):
            router.offer(QueuedRequest(entry_id, "a", SchedulingState(0, entry_id, 0.0, work_s), KvDemand(8, 8)))
        await router.no_credit()
        await running.attach_ready("a")
        assert (await router.credit()).entry_id == 2
        assert running.service.num_overtaken == {"a": 1}


async def test_a_unit_first_tells_each_router_the_fingerprints_of_its_weights(served_unit: ServedUnit) -> None:
    router = served_unit.router()
    await router.next_message()
    assert router.unit_hello is not None
    assert {one.model: one.fingerprint for one in router.unit_hello.models} == FINGERPRINTS


# Step costs


async def test_a_new_stream_gets_the_step_costs_of_models_whose_workers_have_measured_theirs(
    served_unit: ServedUnit,
) -> None:
    prefill, decode = await served_unit.attach_ready("a")
    _, decode_of_b = await served_unit.attach_ready("b")
    prefill_cost, decode_cost = StepCost(0.1, 0.2, 0.3), StepCost(1.0, 2.0, 3.0, 4.0, 5.0)
    for attachment, cost in ((prefill, prefill_cost), (decode, decode_cost), (decode_of_b, decode_cost)):
        attachment.page.write_cost(attachment.slot, cost)
    (sent,) = (await served_unit.router().next_message()).costs.models
    assert sent.model == "a"
    assert convert.cost_from_wire(sent.prefill) == prefill_cost
    assert convert.cost_from_wire(sent.decode) == decode_cost


async def test_step_costs_are_sent_at_most_once_in_their_interval(served_unit: ServedUnit, clock: ManualClock) -> None:
    router = served_unit.router()

    async def kinds_until_refused() -> list[str | None]:
        router.offer(queued(1, "unknown"))
        kinds: list[str | None] = []
        while kinds[-1:] != ["refused"]:
            kinds.append((await router.next_message()).WhichOneof("message"))
        return [kind for kind in kinds if kind != "loads"]

    assert await kinds_until_refused() == ["costs", "refused"]
    assert await kinds_until_refused() == ["costs", "refused"], "those of the first round"
    assert await kinds_until_refused() == ["refused"]
    clock.advance(COSTS_EVERY_S)
    assert await kinds_until_refused() == ["refused"], "they follow the refusal"
    assert await kinds_until_refused() == ["costs", "refused"]


# Loads of other routers


async def test_a_router_is_told_what_other_routers_have_on_the_unit(served_unit: ServedUnit) -> None:
    workers = await Workers.of(served_unit)
    first, second = served_unit.router("first"), served_unit.router("second")
    assert all(load.num_sequences == 0 for load in (await second.loads()).models)
    await workers.decoding(first, 1, 8)
    hashes = tuple(bytes([value]) * 16 for value in range(3))
    first.offer(queued(2, "b", 48, hashes=hashes))
    while (loads := {load.model: load for load in (await second.loads()).models})["b"].num_sequences == 0:
        pass
    assert (loads["a"].num_sequences, loads["a"].prefill_tokens) == (1, 0), "its prompt is computed"
    assert (loads["b"].num_sequences, loads["b"].prefill_tokens) == (1, 48)
    assert loads["b"].prefill_context == context_of(0, 48)
    first.cancel()
    while any(load.num_sequences for load in (await second.loads()).models if load.model == "b"):
        pass


# Models that are removed


async def test_queued_requests_of_a_removed_model_are_refused_and_its_leases_continue(served_unit: ServedUnit) -> None:
    workers, router = await Workers.of(served_unit), served_unit.router()
    leases = [await workers.decoding(router, entry_id, 8) for entry_id in range(4)]
    router.offer(queued(7))
    router.offer(queued(8, "b"))
    await router.no_credit()
    served_unit.service.remove_model("a")
    assert await router.refused() == (7, "model", "'a' is no longer served")
    router.offer(queued(9))
    assert await router.refused() == (9, "model", "'a' is not served by this unit; it serves: b, c")
    assert await workers.decode.grow(leases[0].ref, 1)
    for lease in leases:
        assert "a" in served_unit.unit.models
        await workers.decode.release(lease.ref, ())
    assert [model.model for model in (await status_of(served_unit)).models] == ["b", "c"]
    assert served_unit.unit.admission.count("b") == 1


async def test_workers_of_a_removed_model_are_refused(served_unit: ServedUnit) -> None:
    served_unit.service.remove_model("a")
    with pytest.raises(MeshError, match="refused decode of a"):
        await attach(served_unit.attach_path, Role.DECODE, "a", "unix:x")


# Leases


async def test_a_lease_passes_through_all_its_states(served_unit: ServedUnit) -> None:
    workers, router, leases = await Workers.of(served_unit), served_unit.router(), served_unit.unit.leases
    watch = LeaseWatch(served_unit, workers.decode_name)
    hashes = block_hashes(range(24), 8, b"root")
    router.offer(queued(1, num_tokens=32, hashes=hashes, max_cached_tokens=31))
    ref = convert.ref_from_wire((await router.credit()).lease)
    acquired = await workers.prefill.acquire(ref)
    arrival = asyncio.ensure_future(watch.next())
    await workers.prefill.move(acquired.ref, workers.decode_name, 25, (11, 12))
    lease = await arrival
    assert isinstance(lease, Lease)
    assert lease == Lease(LeaseRef(ref.lease_id, 3), "a", acquired.block_ids, 25, (11, 12))
    added = await workers.decode.grow(lease.ref, 2)
    assert leases.of_owner(workers.decode_name)[0].block_ids == (*lease.block_ids, *added)
    assert await workers.decode.begin_swap_out(lease.ref, SWAP_PAGE_BYTES + 1) == (0, 1)
    await workers.decode.finish_swap_out(lease.ref, hashes)
    assert leases.count_states("a") == {LeaseState.SWAPPED: 1}
    block_ids, num_cached = await workers.decode.begin_swap_in(lease.ref, FIRST, KvDemand(48, 64, hashes, 47))
    assert (len(block_ids), block_ids[:3], num_cached) == (6, lease.block_ids[:3], 3)
    await workers.decode.finish_swap_in(lease.ref)
    await workers.decode.release(lease.ref, hashes)
    assert (len(leases), served_unit.unit.swap.num_free_pages) == (0, 4)
    assert served_unit.unit.blocks.num_cached("a") == 3


async def test_calls_for_a_lease_that_does_not_exist_raise_lease_lost(served_unit: ServedUnit) -> None:
    workers, ref = await Workers.of(served_unit), LeaseRef(77, 1)
    client = workers.decode
    calls = [
        client.acquire(ref),
        client.move(ref, workers.decode_name, 1, ()),
        client.grow(ref, 1),
        client.begin_swap_out(ref, 1),
        client.finish_swap_out(ref, ()),
        client.begin_swap_in(ref, FIRST, KvDemand(1, 1)),
        client.finish_swap_in(ref),
        client.release(ref, ()),
    ]
    for call in calls:
        with pytest.raises(LeaseLost, match="lease 77 does not exist or has ended"):
            await call


async def test_only_an_attached_worker_can_acquire_or_receive_or_watch(served_unit: ServedUnit) -> None:
    workers, router = await Workers.of(served_unit), served_unit.router()
    router.offer(queued(1))
    ref = convert.ref_from_wire((await router.credit()).lease)
    stranger = LeaseClient(served_unit.channel, "stranger")
    with pytest.raises(WorkerLost, match="worker stranger is not attached"):
        await stranger.acquire(ref)
    lease = await workers.prefill.acquire(ref)
    with pytest.raises(WorkerLost, match="worker stranger is not attached"):
        await workers.prefill.move(lease.ref, "stranger", 8, ())
    with pytest.raises(WorkerLost, match="worker stranger is not attached"):
        await anext(stranger.watch())
    assert served_unit.unit.leases.of_owner(workers.prefill_name) == [lease]


async def test_a_full_pool_and_a_full_swap_region_raise_overloaded(served_unit: ServedUnit) -> None:
    workers, router = await Workers.of(served_unit), served_unit.router()
    lease = await workers.decoding(router, 1, 4 * slab_tokens(served_unit.unit, "a"))
    with pytest.raises(Overloaded, match=r"^1 token blocks are not available to this lease: the KV pool is full"):
        await workers.decode.grow(lease.ref, 1)
    num_bytes = 5 * SWAP_PAGE_BYTES
    with pytest.raises(Overloaded, match=f"the swap region has fewer than {num_bytes} free bytes"):
        await workers.decode.begin_swap_out(lease.ref, num_bytes)


async def test_a_released_lease_makes_a_queued_request_admitted(served_unit: ServedUnit) -> None:
    workers, router = await Workers.of(served_unit), served_unit.router()
    capacity = 4 * slab_tokens(served_unit.unit, "a")
    lease = await workers.decoding(router, 1, capacity)
    router.offer(queued(2, num_tokens=capacity))
    await router.no_credit()
    await workers.decode.release(lease.ref, ())
    assert (await router.credit()).entry_id == 2


async def test_an_expired_credit_cannot_be_acquired(served_unit: ServedUnit, clock: ManualClock) -> None:
    workers, router = await Workers.of(served_unit), served_unit.router()
    router.offer(queued(1))
    credit = await router.credit()
    clock.advance(CREDIT_TTL_S)
    served_unit.service.changed()
    with pytest.raises(LeaseLost, match="does not exist or has ended"):
        await workers.prefill.acquire(convert.ref_from_wire(credit.lease))


class NoContext:
    """The context of a call that is made in this process."""

    async def send_initial_metadata(self, metadata: object) -> None:
        pass


def test_an_unused_credit_expires_though_no_call_arrives() -> None:
    unit = make_unit()
    attach_ready(unit, "a")
    config = UnitConfig(models=tuple(ModelConfig(name=name) for name in SHAPES))

    async def wait_for_expiry() -> float:
        grants, clock = GrantTable(), VirtualClock()
        service = KvStoreService(config, unit, grants, clock, {})

        async def messages() -> AsyncIterator[kvstore_pb2.AdmitRequest]:
            yield kvstore_pb2.AdmitRequest(hello=kvstore_pb2.RouterHello(router="r"))
            yield kvstore_pb2.AdmitRequest(offer=convert.queued_to_wire(queued(1)))
            while len(unit.leases):
                await asyncio.sleep(0.5)

        context: Any = NoContext()
        async for _ in service.Admit(messages(), context):
            pass
        grants.close()
        return clock.monotonic_s()

    assert run_virtually(wait_for_expiry()) == CREDIT_TTL_S
    assert unit.next_change_s() is None


async def test_routers_whose_clocks_differ_get_credits_in_the_order_in_which_requests_came(
    served_unit: ServedUnit, clock: ManualClock
) -> None:
    fast, slow, hour_s = served_unit.router("fast"), served_unit.router("slow"), 3600.0
    for router, skew_s, age_s in ((slow, -hour_s, 1.0), (fast, hour_s, 5.0)):
        now_s = clock.unix_s() + skew_s
        router.offer(queued(1, arrived_at_s=now_s - age_s), sent_at_unix_s=now_s)
        await router.no_credit()
    workers = await Workers.of(served_unit)
    first, second = await fast.credit(), await slow.credit()
    assert first.decision < second.decision
    assert clock.unix_s() - first.scheduling.arrived_at_unix_s == pytest.approx(5.0)
    assert clock.unix_s() - second.scheduling.arrived_at_unix_s == pytest.approx(1.0)
    assert workers


# Watching


async def test_a_watch_begins_with_the_leases_that_the_worker_has(served_unit: ServedUnit) -> None:
    workers, router = await Workers.of(served_unit), served_unit.router()
    first, second = [await workers.decoding(router, entry_id, 8) for entry_id in (1, 2)]
    watch = LeaseWatch(served_unit, workers.decode_name)
    assert [await watch.next() for _ in range(2)] == [first, second]


async def test_a_later_watch_of_a_worker_replaces_the_earlier_one(served_unit: ServedUnit) -> None:
    workers, router = await Workers.of(served_unit), served_unit.router()
    lease = await workers.decoding(router, 1, 8)
    first = LeaseWatch(served_unit, workers.decode_name)
    assert await first.next() == lease
    second = LeaseWatch(served_unit, workers.decode_name)
    assert await second.next() == lease
    first.cancel()
    await router.no_credit()
    another = await workers.decoding(router, 2, 8)
    assert await second.next() == another


async def test_a_watching_worker_learns_where_the_tenants_of_its_leases_stand(
    tmp_path: Path, clock: ManualClock
) -> None:
    unit = Unit(4 * SLAB_BYTES, SLAB_BYTES, {"a": UnitModel(SHAPES["a"], 4, 512)}, fairness=Fairness(1.0))
    async with served(tmp_path, unit, clock) as running:
        workers, router = await Workers.of(running), running.router()
        running.service._unit.reclaim.costs_of = lambda model: KvCosts()
        lease = await workers.decoding(router, 1, 8)
        events = workers.decode.watch()
        assert await anext(events) == lease
        router.offer(replace(queued(2), tenant="b"))
        await router.credit()
        changed = await asyncio.wait_for(anext(events), LONGEST_WAIT_S)
        assert isinstance(changed, LeaseStandings)
        assert (changed.lease_ids, changed.standing.has_rivals) == ((lease.ref.lease_id,), True)
        await events.aclose()  # type: ignore[attr-defined]


async def test_a_watching_worker_is_asked_to_preempt_a_lease_whose_memory_another_model_claims(
    served_unit: ServedUnit, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvstore.service")
    served_unit.service._trace_decisions = True
    unit = served_unit.unit
    unit.quotas.slabs |= {"a": 2, "b": 2, "c": 0}
    borrower, claimant = await Workers.of(served_unit, "a"), await Workers.of(served_unit, "b")
    router = served_unit.router()
    slab = slab_tokens(unit, "a")
    leases = [await borrower.decoding(router, entry_id, slab, float(entry_id)) for entry_id in (1, 2, 3, 4)]
    watch = LeaseWatch(served_unit, borrower.decode_name)
    assert [await watch.next() for _ in leases] == leases
    router.offer(queued(9, "b", 2 * slab_tokens(unit, "b")))
    await router.no_credit()
    clock.advance(RECLAIM_AFTER_S)
    for victim in (leases[3], leases[2]):
        served_unit.service.changed()
        assert await watch.next() == victim.ref.lease_id
        named = f"lease {victim.ref.lease_id} of {borrower.decode_name}"
        assert f"{named} has to free its memory: kv_quota" in caplog.messages
        await borrower.decode.release(victim.ref, ())
        clock.advance(RECLAIM_EVERY_S)
    credit = await router.credit()
    assert (credit.entry_id, credit.decode.name) == (9, claimant.decode_name)


# Swap in


async def until_waiting(served_unit: ServedUnit, num_entries: int) -> None:
    """Waits, call by call, until so many entries of model `a` wait."""
    while served_unit.unit.admission.count("a") != num_entries:
        await status_of(served_unit)


async def test_a_swap_in_waits_for_its_turn_among_queued_requests(served_unit: ServedUnit) -> None:
    workers, router = await Workers.of(served_unit), served_unit.router()
    capacity = 4 * slab_tokens(served_unit.unit, "a")
    swapped = await workers.swapped(router, 1, 8)
    running = await workers.decoding(router, 2, capacity)
    router.offer(queued(3, num_tokens=capacity, arrived_at_s=9.0))
    waiting = asyncio.ensure_future(workers.decode.begin_swap_in(swapped.ref, FIRST, KvDemand(8, 16)))
    await until_waiting(served_unit, 2)
    await workers.decode.release(running.ref, ())
    block_ids, num_cached = await waiting
    assert (len(block_ids), num_cached) == (1, 0)
    await router.no_credit()


async def test_a_cancelled_swap_in_leaves_the_order_and_the_lease_stays_swapped(served_unit: ServedUnit) -> None:
    workers, router = await Workers.of(served_unit), served_unit.router()
    swapped = await workers.swapped(router, 1, 8)
    running = await workers.decoding(router, 2, 4 * slab_tokens(served_unit.unit, "a"))
    waiting = asyncio.ensure_future(workers.decode.begin_swap_in(swapped.ref, FIRST, KvDemand(8, 16)))
    await until_waiting(served_unit, 1)
    waiting.cancel()
    await until_waiting(served_unit, 0)
    await workers.decode.release(running.ref, ())
    assert served_unit.unit.leases.state_of(swapped.ref, workers.decode_name) is LeaseState.SWAPPED
    assert (await workers.decode.begin_swap_in(swapped.ref, FIRST, KvDemand(8, 16)))[1] == 0


async def test_a_swap_in_whose_lease_is_released_ends(served_unit: ServedUnit) -> None:
    workers, router = await Workers.of(served_unit), served_unit.router()
    swapped = await workers.swapped(router, 1, 8)
    await workers.decoding(router, 2, 4 * slab_tokens(served_unit.unit, "a"))
    waiting = asyncio.ensure_future(workers.decode.begin_swap_in(swapped.ref, FIRST, KvDemand(8, 16)))
    await until_waiting(served_unit, 1)
    await workers.decode.release(swapped.ref, ())
    with pytest.raises(LeaseLost, match="was released while it waited for memory"):
        await waiting
    assert served_unit.unit.admission.count("a") == 0


async def test_a_later_swap_in_of_a_lease_replaces_the_earlier_one(served_unit: ServedUnit) -> None:
    workers, router = await Workers.of(served_unit), served_unit.router()
    swapped = await workers.swapped(router, 1, 8)
    running = await workers.decoding(router, 2, 4 * slab_tokens(served_unit.unit, "a"))
    earlier = asyncio.ensure_future(workers.decode.begin_swap_in(swapped.ref, FIRST, KvDemand(8, 16)))
    await until_waiting(served_unit, 1)
    later = asyncio.ensure_future(workers.decode.begin_swap_in(swapped.ref, FIRST, KvDemand(16, 16)))
    while served_unit.unit.admission._entries[workers.decode_name, 1].request.demand.num_tokens != 16:
        await status_of(served_unit)
    earlier.cancel()
    await router.no_credit()
    await workers.decode.release(running.ref, ())
    assert len((await later)[0]) == 2


async def test_a_refused_swap_in_does_not_disturb_the_one_that_waits(served_unit: ServedUnit) -> None:
    workers, router = await Workers.of(served_unit), served_unit.router()
    swapped = await workers.swapped(router, 1, 8)
    running = await workers.decoding(router, 2, 4 * slab_tokens(served_unit.unit, "a"))
    waiting = asyncio.ensure_future(workers.decode.begin_swap_in(swapped.ref, FIRST, KvDemand(8, 16)))
    await until_waiting(served_unit, 1)
    with pytest.raises(LeaseLost, match=f"belongs to {workers.decode_name}, not {workers.prefill_name}"):
        await workers.prefill.begin_swap_in(swapped.ref, FIRST, KvDemand(8, 16))
    await workers.decode.release(running.ref, ())
    assert len((await waiting)[0]) == 1


async def test_a_lease_that_is_not_swapped_cannot_be_swapped_in(served_unit: ServedUnit) -> None:
    workers, router = await Workers.of(served_unit), served_unit.router()
    lease = await workers.decoding(router, 1, 8)
    with pytest.raises(LeaseLost, match="lease 1 is resident, not swapped"):
        await workers.decode.begin_swap_in(lease.ref, FIRST, KvDemand(8, 16))


# Status


async def test_the_status_of_an_idle_unit_is_its_size_and_its_models(served_unit: ServedUnit) -> None:
    status = await status_of(served_unit)
    assert (status.unit, status.device, status.connected, list(status.workers)) == ("unit7", "cpu", True, [])
    pool = status.pool
    assert (pool.pool_bytes, pool.slab_bytes, pool.num_slabs) == (4 * SLAB_BYTES, SLAB_BYTES, 4)
    assert (pool.num_free_slabs, pool.leased_bytes, pool.cached_bytes, pool.fragmented_bytes) == (4, 0, 0, 0)
    assert (pool.swap_bytes, pool.swap_used_bytes) == (4 * SWAP_PAGE_BYTES, 0)
    assert [model.model for model in status.models] == ["a", "b", "c"]
    assert sum(model.quota_bytes for model in status.models) == pool.pool_bytes
    assert [model.num_free_token_blocks for model in status.models] == [
        4 * (SLAB_BYTES // shape.token_block_bytes) for shape in SHAPES.values()
    ]


async def test_the_status_of_a_worker_is_read_from_its_slot(served_unit: ServedUnit) -> None:
    workers = await Workers.of(served_unit)
    workers.decode_attachment.page.write(workers.decode_attachment.slot, Word.NUM_STEPS, 5)
    prefill, decode = (await status_of(served_unit)).workers
    assert (prefill.name, prefill.num_steps) == (workers.prefill_name, 0)
    assert (decode.name, decode.num_steps) == (workers.decode_name, 5)


async def test_the_status_of_a_unit_whose_state_is_wrong_is_an_error(served_unit: ServedUnit) -> None:
    workers, router = await Workers.of(served_unit), served_unit.router()
    lease = await workers.decoding(router, 1, 8)
    served_unit.unit.blocks.free("a", lease.block_ids)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await status_of(served_unit)
    assert isinstance(from_rpc_error(caught.value), InternalError)
    assert "references differ from the leases" in str(caught.value.details())
    served_unit.unit.blocks.allocate("a", 1)
