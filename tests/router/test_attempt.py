"""Attempts with a worker on a real gRPC server; the test responds to its calls and sends its tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxmesh.clock import ManualClock
from muxmesh.engine.api import Finished, Tokens
from muxmesh.errors import (
    EngineFailed,
    InternalError,
    LeaseLost,
    MeshError,
    RequestAborted,
    RequestPreempted,
    Unavailable,
    WorkerLost,
)
from muxmesh.execution import NO_EXECUTION, Execution, PreemptionReason
from muxmesh.internal.v1 import decode_pb2, prefill_pb2
from muxmesh.rpc import convert
from muxmesh.rpc.channels import internal_channel
from muxmesh.types import (
    Candidate,
    EngineRequest,
    Finish,
    FinishReason,
    LeaseRef,
    Sampling,
    SchedulingState,
    Stopping,
    TokenLogprobs,
)
from router.admission_client import Credit
from router.attempt import AttemptEvent, Prefilled, Reported, WorkerChannels, run_attempt
from tests.support.fake_unit import FakeWorker, PendingCall, serving
from tests.support.pipeline_parts import until

REQUEST = EngineRequest("r", "m", (40, 41, 42), Sampling(seed=5), Stopping(9), SchedulingState(0, 1000.0))
LENGTH = Finish(FinishReason.LENGTH)
NOTHING_MORE = Reported(NO_EXECUTION, is_final=True)


@dataclass
class Setup:
    worker: FakeWorker
    channels: WorkerChannels
    clock: ManualClock
    credit: Credit

    def attempt(self, request: EngineRequest = REQUEST, lease_id: int = 7) -> AsyncGenerator[AttemptEvent, None]:
        return run_attempt(self.channels, self.clock, request, replace(self.credit, lease=LeaseRef(lease_id, 3)))


@pytest_asyncio.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    worker, channels = FakeWorker(), WorkerChannels("router-1")
    async with serving(tmp_path / "w.sock", worker.services) as address:
        credit = Credit(LeaseRef(7, 3), "p.1", address, "d.1", address, 1, 0, REQUEST.scheduling)
        yield Setup(worker, channels, ManualClock(50.0), credit)
        await channels.close()


async def collect(events: AsyncGenerator[AttemptEvent, None]) -> list[AttemptEvent]:
    async with aclosing(events):
        return [event async for event in events]


async def collect_until_error(events: AsyncGenerator[AttemptEvent, None], found: list[AttemptEvent]) -> MeshError:
    """Appends the events to ``found``. Returns the error that they end with."""
    with pytest.raises(MeshError) as raised:
        while True:
            found.append(await anext(events))
    return raised.value


def prefilled(*token_ids: int, finish: Finish | None = None, num_cached_tokens: int = 0) -> prefill_pb2.PrefillResponse:
    wire = None if finish is None else convert.finish_to_wire(finish)
    return prefill_pb2.PrefillResponse(token_ids=token_ids, finish=wire, num_cached_tokens=num_cached_tokens)


def new(start_index: int, *token_ids: int, lease_id: int = 7) -> decode_pb2.NewTokens:
    return decode_pb2.NewTokens(lease_id=lease_id, start_index=start_index, token_ids=token_ids)


def ended(num_output_tokens: int, finish: Finish = LENGTH) -> decode_pb2.DecodeResponse:
    return decode_pb2.DecodeResponse(finish=convert.finish_to_wire(finish), num_output_tokens=num_output_tokens)


async def begun(
    setup: Setup, request: EngineRequest = REQUEST
) -> tuple[asyncio.Task[list[AttemptEvent]], PendingCall, PendingCall]:
    """An attempt that has called both workers."""
    running = asyncio.create_task(collect(setup.attempt(request)))
    return running, *await setup.worker.calls()


async def cancelled(*calls: PendingCall) -> None:
    async with asyncio.timeout(20):
        for call in calls:
            await call.cancelled.wait()


async def test_tokens_of_prefill_and_decode_are_one_stream(setup: Setup) -> None:
    running, prefill, decode = await begun(setup)
    prefill.respond(prefilled(10, num_cached_tokens=2))
    setup.worker.send("router-1-1", new(1, 11), new(0, 99, lease_id=8))
    setup.worker.send("router-1-1", new(2, 12, 13))
    decode.respond(ended(4, Finish(FinishReason.EOS, 13)))
    assert await running == [
        Prefilled(2),
        Tokens(0, (10,)),
        Tokens(1, (11,)),
        Tokens(2, (12, 13)),
        NOTHING_MORE,
        Finished(Finish(FinishReason.EOS, 13)),
    ]


async def test_both_workers_get_the_request_and_learn_of_each_other(setup: Setup) -> None:
    running, prefill, decode = await begun(setup)
    assert convert.request_from_wire(prefill.request.request) == REQUEST
    assert convert.request_from_wire(decode.request.request) == REQUEST
    assert convert.ref_from_wire(prefill.request.lease) == LeaseRef(7, 3)
    assert (prefill.request.decode_worker, decode.request.lease_id) == ("d.1", 7)
    assert decode.request.watcher in setup.worker.token_streams
    prefill.respond(prefilled(10, finish=LENGTH))
    await running


async def test_decode_s_response_may_overtake_the_last_tokens(setup: Setup) -> None:
    events = setup.attempt()
    first = asyncio.ensure_future(anext(events))
    prefill, decode = await setup.worker.calls()
    decode.respond(ended(3))
    prefill.respond(prefilled(10))
    assert [await first, await anext(events)] == [Prefilled(0), Tokens(0, (10,))]
    pending = asyncio.ensure_future(anext(events))
    setup.worker.send("router-1-1", new(1, 11))
    assert await pending == Tokens(1, (11,))
    setup.worker.send("router-1-1", new(2, 12))
    assert await collect(events) == [Tokens(2, (12,)), NOTHING_MORE, Finished(LENGTH)]


async def test_log_probabilities_of_prompt_and_output_are_passed_on(setup: Setup) -> None:
    logprobs = (TokenLogprobs(Candidate(11, -0.5, 1), (Candidate(11, -0.5, 1), Candidate(12, -1.5, 2))),)
    wire = convert.logprobs_to_wire(logprobs)
    running, prefill, decode = await begun(setup)
    prefill.respond(prefill_pb2.PrefillResponse(token_ids=[10], logprobs=wire, prompt_logprobs=wire))
    message = new(1, 11)
    message.logprobs.CopyFrom(wire)
    setup.worker.send("router-1-1", message)
    decode.respond(ended(2))
    assert await running == [
        Prefilled(0, logprobs),
        Tokens(0, (10,), logprobs),
        Tokens(1, (11,), logprobs),
        NOTHING_MORE,
        Finished(LENGTH),
    ]


async def test_a_sequence_that_prefill_finishes_does_not_wait_for_decode(setup: Setup) -> None:
    running, prefill, decode = await begun(setup)
    prefill.respond(prefilled(10, finish=Finish(FinishReason.STOP_TOKEN, 10)))
    assert (await running)[1:] == [Tokens(0, (10,)), Finished(Finish(FinishReason.STOP_TOKEN, 10))]
    await cancelled(decode)


async def test_a_resumed_attempt_begins_at_the_index_after_the_known_tokens(setup: Setup) -> None:
    running, prefill, decode = await begun(setup, replace(REQUEST, resume_token_ids=(1, 2, 3)))
    prefill.respond(prefilled(10))
    setup.worker.send("router-1-1", new(4, 11))
    decode.respond(ended(5))
    assert (await running)[1:] == [Tokens(3, (10,)), Tokens(4, (11,)), NOTHING_MORE, Finished(LENGTH)]


async def test_the_wait_for_prefill_is_measured_from_the_calls(setup: Setup) -> None:
    running, prefill, _ = await begun(setup)
    setup.clock.advance(2.5)
    prefill.respond(prefilled(10, finish=LENGTH))
    assert (await running)[0] == Prefilled(0, waited_s=2.5)


ERRORS = [WorkerLost("gone"), LeaseLost("old epoch"), EngineFailed("nan"), RequestAborted("draining")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_an_error_of_prefill_ends_the_attempt_and_cancels_decode(setup: Setup, error: MeshError) -> None:
    running, prefill, decode = await begun(setup)
    prefill.fail(error)
    with pytest.raises(type(error), match=str(error)):
        await running
    await cancelled(decode)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_an_error_of_decode_ends_the_attempt_and_cancels_prefill(setup: Setup, error: MeshError) -> None:
    running, prefill, decode = await begun(setup)
    decode.fail(error)
    with pytest.raises(type(error), match=str(error)):
        await running
    await cancelled(prefill)


async def test_an_error_of_decode_comes_after_the_tokens_before_it(setup: Setup) -> None:
    events = setup.attempt()
    first = asyncio.ensure_future(anext(events))
    prefill, decode = await setup.worker.calls()
    prefill.respond(prefilled(10))
    assert [await first, await anext(events)] == [Prefilled(0), Tokens(0, (10,))]
    setup.worker.send("router-1-1", new(1, 11))
    assert await anext(events) == Tokens(1, (11,))
    decode.fail(WorkerLost("gone"))
    with pytest.raises(WorkerLost, match="gone"):
        await anext(events)


REPORT = Execution({PreemptionReason.ORDER: 2}, 3, 0, 4.0, 5.0, 6.0, is_overdue=True)
LATER = replace(REPORT, batched_s=9.0, num_recomputed=1)


async def test_what_became_of_the_sequence_comes_before_its_finish(setup: Setup) -> None:
    running, prefill, decode = await begun(setup)
    prefill.respond(prefilled(10))
    early = new(1, 11)
    early.execution.CopyFrom(convert.execution_to_wire(REPORT))
    setup.worker.send("router-1-1", early)
    end = ended(2)
    end.execution.CopyFrom(convert.execution_to_wire(LATER))
    decode.respond(end)
    assert (await running)[2:] == [Reported(REPORT), Tokens(1, (11,)), Reported(LATER, True), Finished(LENGTH)]


async def test_a_sequence_whose_kv_was_freed_has_all_of_its_tokens_and_its_report_first(setup: Setup) -> None:
    report, events = convert.execution_to_wire(LATER), list[AttemptEvent]()
    collecting = asyncio.create_task(collect_until_error(setup.attempt(), events))
    prefill, decode = await setup.worker.calls()
    prefill.respond(prefilled(10))
    decode.respond(decode_pb2.DecodeResponse(num_output_tokens=3, execution=report, preempted="pool full"))
    setup.worker.send("router-1-1", new(1, 11, 12))
    assert isinstance(await collecting, RequestPreempted)
    assert events[1:] == [Tokens(0, (10,)), Tokens(1, (11, 12)), Reported(LATER, True)]


async def test_a_worker_that_is_lost_has_reported_what_became_of_the_sequence_before(setup: Setup) -> None:
    events: list[AttemptEvent] = []
    collecting = asyncio.create_task(collect_until_error(setup.attempt(), events))
    prefill, decode = await setup.worker.calls()
    prefill.respond(prefilled(10))
    early = new(1, 11)
    early.execution.CopyFrom(convert.execution_to_wire(REPORT))
    setup.worker.send("router-1-1", early)
    await until(lambda: Tokens(1, (11,)) in events)
    decode.fail(WorkerLost("gone"))
    assert isinstance(await collecting, WorkerLost)
    assert events[2:] == [Reported(REPORT), Tokens(1, (11,))]


async def test_a_gap_in_the_tokens_is_a_bug_of_the_mesh(setup: Setup) -> None:
    running, prefill, decode = await begun(setup)
    prefill.respond(prefilled(10))
    setup.worker.send("router-1-1", new(2, 12))
    with pytest.raises(InternalError, match="decode sent the token at index 2, expected 1"):
        await running
    await cancelled(decode)


@pytest.mark.parametrize("num_events", [0, 2])
async def test_a_closed_attempt_cancels_its_calls(setup: Setup, num_events: int) -> None:
    events = setup.attempt()
    first = asyncio.ensure_future(anext(events))
    prefill, decode = await setup.worker.calls()
    if num_events:
        prefill.respond(prefilled(10))
        assert [await first, await anext(events)] == [Prefilled(0), Tokens(0, (10,))]
        await events.aclose()
        await cancelled(decode)
    else:
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await cancelled(prefill, decode)


async def test_attempts_on_one_worker_share_its_token_stream(setup: Setup) -> None:
    attempts = [asyncio.create_task(collect(setup.attempt(lease_id=lease_id))) for lease_id in (7, 8)]
    for _ in attempts:
        prefill, decode = await setup.worker.calls()
        prefill.respond(prefilled(10))
        decode.respond(ended(2))
    setup.worker.send("router-1-1", new(1, 17), new(1, 18, lease_id=8))
    assert [(await attempt)[2] for attempt in attempts] == [Tokens(1, (17,)), Tokens(1, (18,))]
    assert list(setup.worker.token_streams) == ["router-1-1"]


async def test_no_worker_is_called_before_the_token_stream_is_open(setup: Setup) -> None:
    setup.worker.opens_streams.clear()
    running = asyncio.create_task(collect(setup.attempt()))
    await until(lambda: "router-1-1" in setup.worker.token_streams)
    async with internal_channel(setup.credit.decode_address) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert setup.worker.num_pending_calls == 0
    setup.worker.opens_streams.set()
    prefill, _ = await setup.worker.calls()
    prefill.respond(prefilled(10, finish=LENGTH))
    await running


@pytest.mark.parametrize(
    ("ending", "message"),
    [(None, "the decode worker ended its token stream"), (WorkerLost("restarting"), "restarting")],
)
async def test_a_lost_token_stream_ends_the_attempt_and_the_next_one_opens_another(
    setup: Setup, ending: MeshError | None, message: str
) -> None:
    running, prefill, decode = await begun(setup)
    setup.worker.token_streams["router-1-1"].put_nowait(ending)
    with pytest.raises(WorkerLost, match=message):
        await running
    await cancelled(prefill, decode)
    again, prefill, decode = await begun(setup)
    assert decode.request.watcher == "router-1-2"
    prefill.respond(prefilled(10, finish=LENGTH))
    await again


async def test_a_worker_that_does_not_listen_is_unavailable(setup: Setup, tmp_path: Path) -> None:
    nowhere = f"unix:{tmp_path}/none.sock"
    with pytest.raises(Unavailable):
        await collect(run_attempt(setup.channels, setup.clock, REQUEST, replace(setup.credit, decode_address=nowhere)))
    attempt = run_attempt(setup.channels, setup.clock, REQUEST, replace(setup.credit, prefill_address=nowhere))
    with pytest.raises(Unavailable):
        await collect(attempt)


async def test_an_attempt_that_is_cancelled_while_the_stream_opens_leaves_it_to_others(setup: Setup) -> None:
    opening = asyncio.create_task(collect(setup.attempt()))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    running, prefill, _ = await begun(setup)
    prefill.respond(prefilled(10, finish=LENGTH))
    assert len(await running) == 3
    assert list(setup.worker.token_streams) == ["router-1-1"]
