"""The decode service over its socket, with a real unit behind it and a sim engine."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from decode_svc import lease_arrivals
from decode_svc.service import open_services
from kvstore.grant_page import Word
from kvstore.leases import LeaseState
from muxmesh.block_hashes import block_hashes
from muxmesh.clock import ManualClock, SystemClock
from muxmesh.device.kv_codec import encoded_bytes
from muxmesh.engine.step import Runner
from muxmesh.errors import EngineFailed, InternalError, InvalidRequest, SequenceFailed, Unavailable
from muxmesh.execution import PreemptionReason
from muxmesh.internal.v1 import decode_pb2, decode_pb2_grpc
from muxmesh.rpc import convert
from muxmesh.rpc.channels import internal_channel
from muxmesh.rpc.server import MeshServer
from muxmesh.rpc.status_codes import from_rpc_error
from muxmesh.sequence_states import SequenceState
from muxmesh.types import (
    EngineRequest,
    Finish,
    FinishReason,
    KvDemand,
    KvFormat,
    Lease,
    Role,
    Sampling,
    SchedulingState,
    Stopping,
)
from tests.support.engines import FailingRunner, GatedRunner, UncomputableRunner, running_engine
from tests.support.worker_unit import CONFIG, IDENTITY, SHAPE, SLAB_TOKENS, RunningUnit, running_unit
from worker.attachment import Attachment
from worker.kv_swapper import KvSwapper
from worker.lease_client import LeaseClient

PROMPT = tuple(range(40, 60))
REQUEST = EngineRequest("r", "m", PROMPT, Sampling(seed=1), Stopping(12), SchedulingState(0, 0.0))
DECODE_STATES = set(SequenceState) - {SequenceState.PREFILL}
DEMAND = KvDemand(len(PROMPT) + 4, len(PROMPT) + 12)


@dataclass
class Watch:
    """A router's WatchTokens call."""

    call: Any

    async def message(self) -> decode_pb2.WatchTokensResponse:
        async with asyncio.timeout(20):
            message: decode_pb2.WatchTokensResponse = await self.call.read()
        return message

    async def tokens(self, count: int) -> list[tuple[int, int, int]]:
        """The next ``count`` tokens: lease id, output index and token id."""
        found: list[tuple[int, int, int]] = []
        while len(found) < count:
            for new in (await self.message()).sequences:
                indices = range(new.start_index, new.start_index + len(new.token_ids))
                found += zip([new.lease_id] * len(new.token_ids), indices, new.token_ids, strict=True)
        return found


@dataclass
class DecodeWorker:
    """A decode worker that serves, and the prefill worker before it."""

    unit: RunningUnit
    attachment: Attachment
    prefill: LeaseClient
    stub: Any

    async def hand_off(self, demand: KvDemand = DEMAND) -> Lease:
        """A lease with the whole prompt computed and one token sampled."""
        return await self.unit.hand_off(self.prefill, self.attachment.worker, demand, len(PROMPT), (7,))

    async def watch(self, watcher: str = "w") -> Watch:
        call = self.stub.WatchTokens(decode_pb2.WatchTokensRequest(watcher=watcher))
        await call.initial_metadata()
        return Watch(call)

    def decode(self, lease: Lease, request: EngineRequest = REQUEST, watcher: str = "w") -> Any:
        """The call; await it with `result`."""
        wire = convert.request_to_wire(request)
        return self.stub.Decode(decode_pb2.DecodeRequest(request=wire, lease_id=lease.ref.lease_id, watcher=watcher))

    async def until_empty(self) -> None:
        await self.unit.until(self.unit.is_empty)


async def result(call: Any) -> Any:
    """The response of a call, or the error of the mesh that it ended with."""
    try:
        async with asyncio.timeout(20):
            return await call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


@asynccontextmanager
async def decode_worker(directory: Path, runner: Runner | None = None, **options: Any) -> AsyncIterator[DecodeWorker]:
    async with AsyncExitStack() as stack:
        unit = await stack.enter_async_context(running_unit(directory, **options))
        prefill = unit.lease_client(await unit.attach(Role.PREFILL))
        attachment = await unit.attach(Role.DECODE)
        leases = unit.lease_client(attachment)
        stack.push_async_callback(leases.close)
        swapper = None
        if attachment.pool.has_swap:
            swapper = KvSwapper(attachment, SHAPE, leases, SystemClock(), unit.counters)
            stack.callback(swapper.close)
        engine = await stack.enter_async_context(running_engine(runner))
        services = await stack.enter_async_context(open_services(unit.context(attachment, engine, leases, swapper)))
        server = MeshServer(services)
        await server.start([f"unix:{directory}/d.sock"])
        stack.push_async_callback(server.stop, 0)
        channel = await stack.enter_async_context(internal_channel(f"unix:{directory}/d.sock"))
        await unit.until(lambda: attachment.worker in unit.service._watchers)
        yield DecodeWorker(unit, attachment, prefill, decode_pb2_grpc.DecodeServiceStub(channel))


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[DecodeWorker]:
    async with decode_worker(tmp_path) as running:
        yield running


async def test_tokens_continue_after_those_of_prefill_and_the_lease_is_released(worker: DecodeWorker) -> None:
    watch, lease = await worker.watch(), await worker.hand_off()
    response = await result(worker.decode(lease))
    assert convert.finish_from_wire(response.finish) == Finish(FinishReason.LENGTH)
    assert response.num_output_tokens == 12
    tokens = await watch.tokens(11)
    assert [(lease_id, index) for lease_id, index, _ in tokens] == [(lease.ref.lease_id, n) for n in range(1, 12)]
    await worker.until_empty()


async def test_the_kv_of_a_finished_sequence_stays_in_the_prefix_cache(worker: DecodeWorker) -> None:
    watch, lease = await worker.watch(), await worker.hand_off()
    await result(worker.decode(lease))
    output = [token for _, _, token in await watch.tokens(11)]
    await worker.until_empty()
    hashes = block_hashes((*PROMPT, 7, *output[:-1]), CONFIG.block_size, IDENTITY.root())
    assert worker.unit.state.blocks.count_cached("m", hashes) == len(hashes) == 3


async def test_a_call_may_arrive_before_its_lease(worker: DecodeWorker) -> None:
    await worker.watch()
    credit = await worker.unit.credit(DEMAND)
    lease = await worker.prefill.acquire(credit)
    call = worker.decode(lease)
    with pytest.raises(Unavailable):  # by the time that this call has ended, the one before it waits
        await result(worker.decode(lease, watcher="unknown"))
    await worker.prefill.move(lease.ref, worker.attachment.worker, len(PROMPT), (7,))
    assert (await result(call)).num_output_tokens == 12


async def test_tokens_of_one_step_for_one_router_are_one_message(tmp_path: Path) -> None:
    runner = GatedRunner()
    async with decode_worker(tmp_path, runner) as worker:
        watch, leases = await worker.watch(), [await worker.hand_off() for _ in range(2)]
        calls = [worker.decode(lease) for lease in leases]
        await runner.begun(1)
        while len(runner.steps[-1].chunks) < 2:
            num_begun = len(runner.steps)
            runner.let()
            await watch.message()
            await runner.begun(num_begun + 1)
        runner.let()
        assert len((await watch.message()).sequences) == 2
        runner.open()
        for call in calls:
            await result(call)


async def test_routers_get_the_tokens_of_their_own_sequences(worker: DecodeWorker) -> None:
    watches = {name: await worker.watch(name) for name in ("a", "b")}
    leases = {name: await worker.hand_off() for name in watches}
    await asyncio.gather(*(result(worker.decode(leases[name], watcher=name)) for name in watches))
    for name, watch in watches.items():
        assert {lease_id for lease_id, _, _ in await watch.tokens(11)} == {leases[name].ref.lease_id}


async def test_a_call_whose_watcher_is_not_connected_fails_and_leaves_the_lease_to_another(
    worker: DecodeWorker,
) -> None:
    await worker.watch()
    lease = await worker.hand_off()
    with pytest.raises(Unavailable, match="no watcher 'other' is connected"):
        await result(worker.decode(lease, watcher="other"))
    assert (await result(worker.decode(lease))).num_output_tokens == 12


async def test_a_cancelled_call_releases_the_lease_after_the_step_in_flight(tmp_path: Path) -> None:
    runner = GatedRunner()
    async with decode_worker(tmp_path, runner) as worker:
        await worker.watch()
        call = worker.decode(await worker.hand_off())
        await runner.begun(1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        for _ in range(10):  # a release that did not wait would reach the unit before these calls
            with pytest.raises(Unavailable):
                await result(worker.stub.Decode(decode_pb2.DecodeRequest(watcher="other")))
        other = await worker.hand_off()
        assert len(worker.unit.state.leases) == 2
        runner.open()
        await result(worker.decode(other))
        await worker.until_empty()


async def test_a_failed_step_fails_the_call_and_releases_the_lease(tmp_path: Path) -> None:
    async with decode_worker(tmp_path, FailingRunner()) as worker:
        await worker.watch()
        with pytest.raises(EngineFailed, match="ArithmeticError: nan in layer 3"):
            await result(worker.decode(await worker.hand_off()))
        await worker.until_empty()


async def test_of_a_sequence_that_cannot_be_computed_nothing_is_shared(tmp_path: Path) -> None:
    async with decode_worker(tmp_path, UncomputableRunner(after=9)) as worker:
        watch, lease = await worker.watch(), await worker.hand_off()
        with pytest.raises(SequenceFailed, match="not finite"):
            await result(worker.decode(lease))
        output = [token for _, _, token in await watch.tokens(9)]
        await worker.until_empty()
        hashes = block_hashes((*PROMPT, 7, *output), CONFIG.block_size, IDENTITY.root())
        assert len(hashes) == 3 and worker.unit.state.blocks.count_cached("m", hashes[2:]) == 0
        assert worker.attachment.progress.read() == {}


async def test_an_error_in_the_tokens_of_one_sequence_fails_only_its_call(
    worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The progress page takes no more blocks of the first sequence."""
    watch, leases = await worker.watch(), [await worker.hand_off() for _ in range(2)]
    commit = worker.attachment.progress.commit

    def failing(lease_id: int, *arguments: Any) -> None:
        if lease_id == leases[0].ref.lease_id:
            raise BufferError("the page is damaged")
        commit(lease_id, *arguments)

    monkeypatch.setattr(worker.attachment.progress, "commit", failing)
    calls = [worker.decode(lease) for lease in leases]
    with pytest.raises(InternalError, match="BufferError: the page is damaged"):
        await result(calls[0])
    assert (await result(calls[1])).num_output_tokens == 12
    assert len([entry for entry in await watch.tokens(11) if entry[0] == leases[1].ref.lease_id]) == 11
    await worker.until_empty()


async def test_a_token_that_the_model_does_not_have_is_refused_and_nothing_is_shared(worker: DecodeWorker) -> None:
    await worker.watch()
    unknown = replace(REQUEST, prompt_token_ids=(1000, *PROMPT[1:]))
    with pytest.raises(InvalidRequest, match="token id 1000 is unknown; the model has 1000 tokens"):
        await result(worker.decode(await worker.hand_off(), unknown))
    await worker.until_empty()
    hashes = block_hashes(unknown.prompt_token_ids, CONFIG.block_size, IDENTITY.root())
    assert worker.unit.state.blocks.count_cached("m", hashes) == 0


async def test_a_worker_whose_watch_of_leases_fails_gives_up(
    worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object) -> None:
        raise BufferError("a bug")

    monkeypatch.setattr(lease_arrivals.LeaseArrivals, "lease_arrived", failing)
    await worker.hand_off()
    await worker.unit.until(lambda: bool(worker.unit.given_up))
    assert worker.unit.given_up == ["the task lease watch failed: BufferError: a bug"]


async def test_a_request_that_does_not_fit_its_lease_fails_and_the_lease_is_released(worker: DecodeWorker) -> None:
    await worker.watch()
    longer = replace(REQUEST, prompt_token_ids=tuple(range(100)))
    with pytest.raises(InternalError, match="3 token blocks, needs 13"):
        await result(worker.decode(await worker.hand_off(), longer))
    await worker.until_empty()


async def test_a_lease_whose_call_does_not_arrive_is_released(
    worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_arrivals, "ORPHAN_GRACE_S", 0.0)
    await worker.hand_off()
    await worker.until_empty()


async def test_a_pre_empted_request_that_cannot_be_swapped_ends(tmp_path: Path) -> None:
    async with decode_worker(tmp_path) as worker:
        watch = await worker.watch()
        lease = await worker.hand_off(replace(DEMAND, max_tokens=SLAB_TOKENS))
        first = await worker.hand_off(KvDemand(SLAB_TOKENS - 24, SLAB_TOKENS - 24))
        for record in worker.unit.state.leases.of_models(["m"]):
            if record.lease.ref.lease_id == first.ref.lease_id:
                record.scheduling = SchedulingState(-1, 0.0)  # it precedes the other one, so it is no victim of it
        ended = await result(worker.decode(lease, replace(REQUEST, stopping=Stopping(40))))
        assert not ended.HasField("finish") and "not swapped: the unit has no swap region" in ended.preempted
        tokens = await watch.tokens(ended.num_output_tokens - 1)
        assert [index for _, index, _ in tokens] == list(range(1, ended.num_output_tokens)), "none is lost"
        execution = convert.execution_from_wire(ended.execution)
        assert (execution.preemptions, execution.num_recomputed) == ({PreemptionReason.KV_FULL: 1}, 1)
        assert execution.batched_s > 0 and execution.swapped_s == 0
        await worker.unit.until(lambda: len(worker.unit.state.leases) == 1)
        counters = worker.unit.counters
        assert (counters.preemptions, counters.num_recomputed) == ({PreemptionReason.KV_FULL: 1}, 1)


@pytest.mark.parametrize("kv_format", [None, "int8"])
async def test_a_sequence_whose_blocks_another_model_claims_is_swapped_and_continues(
    tmp_path: Path, kv_format: KvFormat | None
) -> None:
    clock, runner = ManualClock(100.0), GatedRunner()
    options: dict[str, Any] = {"num_slabs": 2, "num_swap_pages": 8, "models": ("m", "other"), "clock": clock}
    async with decode_worker(tmp_path, runner, **options) as worker:
        unit = worker.unit
        other = unit.lease_client(await unit.attach(Role.PREFILL, "other"))
        await unit.attach(Role.DECODE, "other")
        await worker.watch()
        both_slabs = KvDemand(2 * SLAB_TOKENS, 2 * SLAB_TOKENS)
        lease = await worker.hand_off(both_slabs)
        request = replace(REQUEST, stopping=Stopping(2 * SLAB_TOKENS - len(PROMPT)), kv_swap_format=kv_format)
        call = worker.decode(lease, request)
        await runner.begun(1)
        unit.offer(KvDemand(8, 8), "other")
        await unit.until(lambda: unit.state.next_change_s() is not None)
        clock.advance(1.5)
        unit.service.changed()
        while unit.state.leases.state_of(lease.ref, worker.attachment.worker) is not LeaseState.SWAPPED:
            runner.let()
            await asyncio.sleep(0)
        num_bytes = worker.attachment.page.read(worker.attachment.slot, Word.SWAP_OUT_BYTES)
        assert num_bytes == encoded_bytes(SHAPE, len(PROMPT) + len(runner.steps), kv_format or "raw")
        claimed = await other.acquire(await unit.next_credit())
        await other.release(claimed.ref, ())
        runner.open()
        assert (await result(call)).num_output_tokens == request.stopping.max_new_tokens
        swaps, states = unit.counters.swaps, unit.counters.states
        assert swaps["out", kv_format or "raw"].num_bytes == num_bytes
        copies = {kind: swap.num_copies for kind, swap in swaps.items() if swap.num_copies}
        assert copies == {("out", kv_format or "raw"): 1, ("in", kv_format or "raw"): 1}
        assert all(states.seconds(SystemClock().monotonic_s())[state] > 0 for state in DECODE_STATES) and not len(
            states
        )


async def test_a_worker_that_gets_no_more_leases_gives_up(worker: DecodeWorker) -> None:
    await worker.unit.server.stop(0)
    await worker.unit.until(lambda: bool(worker.unit.given_up))
    (reason,) = worker.unit.given_up
    assert reason.startswith("no more leases from the unit: ")
