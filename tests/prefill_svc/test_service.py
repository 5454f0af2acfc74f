"""The prefill service over its socket, with a real unit behind it and a sim engine."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from torch import Tensor

from muxmesh.block_hashes import block_hashes
from muxmesh.clock import Clock, ManualClock
from muxmesh.device.torch_device import InterpretedDevice
from muxmesh.engine.step import Runner, SampledToken, Step, StepOutcome
from muxmesh.engine.step_engine import StepEngine
from muxmesh.errors import EngineFailed, InternalError, InvalidRequest, LeaseLost, SequenceFailed, WorkerLost
from muxmesh.internal.v1 import prefill_pb2, prefill_pb2_grpc
from muxmesh.rpc import convert
from muxmesh.rpc.channels import internal_channel
from muxmesh.rpc.server import MeshServer
from muxmesh.rpc.status_codes import from_rpc_error
from muxmesh.types import (
    Candidate,
    EngineRequest,
    Finish,
    FinishReason,
    KvDemand,
    Lease,
    LeaseRef,
    Role,
    Sampling,
    SchedulingState,
    Stopping,
    TokenLogprobs,
)
from prefill_svc.service import PrefillService, open_services
from tests.support.device_model import device_runner
from tests.support.engines import FailingRunner, GatedRunner, UncomputableRunner, running_engine, sim_runner
from tests.support.tiny import TinyShape, write_tiny_model
from tests.support.triton_interpreter import INTERPRETED
from tests.support.worker_unit import CONFIG, IDENTITY, RunningUnit, running_unit
from worker.attachment import Attachment

PROMPT = tuple(range(40, 60))
REQUEST = EngineRequest("r", "m", PROMPT, Sampling(seed=1), Stopping(12), SchedulingState(0, 0.0))
DEMAND = KvDemand(
    len(PROMPT) + 4, len(PROMPT) + 12, block_hashes(PROMPT, CONFIG.block_size, IDENTITY.root()), len(PROMPT) - 1
)


@dataclass
class PrefillWorker:
    """A prefill worker that serves, and a decode worker to hand off to."""

    unit: RunningUnit
    decode: Attachment
    engine: StepEngine
    stub: Any

    def call(self, ref: LeaseRef, request: EngineRequest = REQUEST, to: str | None = None) -> Any:
        wire = prefill_pb2.PrefillRequest(
            request=convert.request_to_wire(request),
            lease=convert.ref_to_wire(ref),
            decode_worker=to or self.decode.worker,
        )
        return self.stub.Prefill(wire)

    async def prefill(self, ref: LeaseRef, request: EngineRequest = REQUEST, to: str | None = None) -> Any:
        """The response, or the error of the mesh."""
        try:
            async with asyncio.timeout(20):
                return await self.call(ref, request, to)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    def handed_off(self) -> Lease:
        """The only lease of the decode worker."""
        (lease,) = self.unit.state.leases.of_owner(self.decode.worker)
        return lease

    async def until_empty(self) -> None:
        await self.unit.until(self.unit.is_empty)


@asynccontextmanager
async def prefill_worker(
    directory: Path,
    runner: Runner | None = None,
    num_tokens: int | None = None,
    clock: Clock | None = None,
    **engine_options: int,
) -> AsyncIterator[PrefillWorker]:
    """``num_tokens`` None: the services as `open_services` makes them. ``clock``: of the service and of the engine."""
    async with AsyncExitStack() as stack:
        unit = await stack.enter_async_context(running_unit(directory))
        attachment, decode = await unit.attach(Role.PREFILL), await unit.attach(Role.DECODE)
        leases = unit.lease_client(attachment)
        stack.push_async_callback(leases.close)
        engine = await stack.enter_async_context(running_engine(runner, clock=clock, grant=None, **engine_options))
        context = unit.context(attachment, engine, leases)
        if clock is not None:
            context = replace(context, clock=clock)
        services = await stack.enter_async_context(open_services(context))
        if num_tokens is not None:
            service = PrefillService(context, num_tokens)
            (descriptor,) = services
            services = {descriptor: lambda server: _register(service, server)}
        server = MeshServer(services)
        await server.start([f"unix:{directory}/p.sock"])
        stack.push_async_callback(server.stop, 0)
        channel = await stack.enter_async_context(internal_channel(f"unix:{directory}/p.sock"))
        yield PrefillWorker(unit, decode, engine, prefill_pb2_grpc.PrefillServiceStub(channel))


def _register(service: PrefillService, server: grpc.aio.Server) -> None:
    prefill_pb2_grpc.add_PrefillServiceServicer_to_server(service, server)


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[PrefillWorker]:
    async with prefill_worker(tmp_path) as running:
        yield running


@pytest.mark.parametrize(("num_tokens", "num_sampled"), [(None, 1), (1, 1), (3, 3)])
async def test_a_lease_is_handed_off_after_the_first_tokens(
    tmp_path: Path, num_tokens: int | None, num_sampled: int
) -> None:
    async with prefill_worker(tmp_path, num_tokens=num_tokens) as worker:
        ref = await worker.unit.credit(DEMAND)
        response = await worker.prefill(ref)
        assert len(response.token_ids) == num_sampled and not response.HasField("finish")
        lease = worker.handed_off()
        assert lease.ref.lease_id == ref.lease_id
        assert lease.num_computed_tokens == len(PROMPT) + num_sampled - 1, "the last token's KV is not computed"
        assert lease.sampled_token_ids == tuple(response.token_ids)
        assert worker.unit.counters.handoff_s.value.cumulative[-1] == 1


async def test_the_prompt_of_a_handed_off_lease_is_in_the_prefix_cache(worker: PrefillWorker) -> None:
    first = await worker.prefill(await worker.unit.credit(DEMAND))
    second = await worker.prefill(await worker.unit.credit(DEMAND))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 16)
    assert first.token_ids == second.token_ids


async def test_resumed_tokens_are_computed_and_not_sampled_again(worker: PrefillWorker) -> None:
    resumed = replace(REQUEST, resume_token_ids=(70, 71))
    response = await worker.prefill(await worker.unit.credit(DEMAND), resumed)
    assert len(response.token_ids) == 1
    assert worker.handed_off().num_computed_tokens == len(PROMPT) + 2


@pytest.mark.parametrize("num_tokens", [1, 3])
async def test_a_sequence_that_finishes_in_prefill_is_released_before_the_response(
    tmp_path: Path, num_tokens: int
) -> None:
    request = replace(REQUEST, stopping=Stopping(1))
    async with prefill_worker(tmp_path, num_tokens=num_tokens) as worker:
        response = await worker.prefill(await worker.unit.credit(DEMAND), request)
        assert convert.finish_from_wire(response.finish) == Finish(FinishReason.LENGTH)
        assert len(response.token_ids) == 1
        assert worker.unit.is_empty()
        assert worker.unit.state.blocks.count_cached("m", DEMAND.block_hashes) == 2, "the whole blocks are cached"


async def test_a_long_prompt_is_computed_in_several_steps(tmp_path: Path) -> None:
    runner = GatedRunner()
    runner.open()
    async with prefill_worker(tmp_path, runner, token_budget=8) as worker:
        await worker.prefill(await worker.unit.credit(DEMAND))
    assert [step.num_tokens for step in runner.steps] == [8, 8, 4]


async def test_a_credit_that_does_not_exist_is_refused(worker: PrefillWorker) -> None:
    with pytest.raises(LeaseLost):
        await worker.prefill(LeaseRef(99, 1))


async def test_a_lease_whose_decode_worker_is_gone_is_released(worker: PrefillWorker) -> None:
    with pytest.raises(WorkerLost, match="decode-m#99 is not attached"):
        await worker.prefill(await worker.unit.credit(DEMAND), to="decode-m#99")
    await worker.until_empty()


async def test_a_cancelled_call_releases_the_lease_after_the_step_in_flight(tmp_path: Path) -> None:
    runner = GatedRunner()
    async with prefill_worker(tmp_path, runner) as worker:
        call = worker.call(await worker.unit.credit(DEMAND))
        await runner.begun(1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        for _ in range(10):  # a release that did not wait would reach the unit before these calls
            with pytest.raises(LeaseLost):
                await worker.prefill(LeaseRef(99, 1))
        assert len(worker.unit.state.leases) == 1
        runner.open()
        await worker.until_empty()


async def test_a_failed_step_fails_the_call_and_releases_the_lease(tmp_path: Path) -> None:
    async with prefill_worker(tmp_path, FailingRunner()) as worker:
        with pytest.raises(EngineFailed, match="ArithmeticError: nan in layer 3"):
            await worker.prefill(await worker.unit.credit(DEMAND))
        await worker.until_empty()
        assert worker.unit.state.blocks.num_cached("m") == 0, "what a failed step wrote is not shared"


async def test_a_prompt_that_does_not_fit_its_lease_fails_and_the_lease_is_released(worker: PrefillWorker) -> None:
    longer = replace(REQUEST, prompt_token_ids=tuple(range(100)))
    with pytest.raises(InternalError, match="3 token blocks, needs 13"):
        await worker.prefill(await worker.unit.credit(DEMAND), longer)
    await worker.until_empty()


class ScoringRunner:
    """A `Runner` whose log-probabilities tell the position that they are of."""

    max_steps = 1

    def unload(self, drop_weights: bool) -> None: ...

    def load(self) -> None: ...

    def run(self, step: Step, may_continue: Callable[[], bool]) -> StepOutcome:
        sampled = sim_runner().run(step).sampled
        return StepOutcome(
            {job_id: (SampledToken(one.token_id, _scored(one.token_id, -0.5)),) for job_id, (one,) in sampled.items()},
            {
                chunk.job_id: tuple(
                    _scored(token, -float(chunk.start + offset))
                    for offset, token in enumerate(chunk.scoring.next_token_ids)
                )
                for chunk in step.chunks
                if chunk.scoring
            },
        )


def _scored(token_id: int, logprob: float) -> TokenLogprobs:
    return TokenLogprobs(Candidate(token_id, logprob, 1))


async def test_log_probabilities_of_prompt_and_output_are_returned_in_order(tmp_path: Path) -> None:
    request = replace(REQUEST, sampling=Sampling(seed=1, logprobs=0, prompt_logprobs=0))
    async with prefill_worker(tmp_path, ScoringRunner(), num_tokens=2, token_budget=8) as worker:
        response = await worker.prefill(await worker.unit.credit(replace(DEMAND, max_cached_tokens=0)), request)
    prompt = convert.logprobs_from_wire(response.prompt_logprobs)
    assert prompt == tuple(_scored(token, -float(index)) for index, token in enumerate(PROMPT[1:]))
    output = convert.logprobs_from_wire(response.logprobs)
    assert output == tuple(_scored(token, -0.5) for token in response.token_ids)


async def test_log_probabilities_that_are_not_requested_are_not_sent(worker: PrefillWorker) -> None:
    response = await worker.prefill(await worker.unit.credit(DEMAND))
    assert not response.HasField("logprobs") and not response.HasField("prompt_logprobs")


async def test_the_wait_for_the_device_is_what_no_step_computed_the_prompt(tmp_path: Path) -> None:
    runner, clock = GatedRunner(), ManualClock()
    async with prefill_worker(tmp_path, runner, clock=clock, max_num_seqs=1) as worker:
        first = worker.call(await worker.unit.credit(DEMAND))
        await runner.begun(1)
        second = worker.call(await worker.unit.credit(DEMAND))
        await worker.unit.until(lambda: len(worker.engine._scheduler._jobs) == 2)
        clock.advance(5.0)
        runner.open()
        assert (await second).device_wait_s == 5.0, "it waited for the step of the first one"
        assert (await first).device_wait_s == 0.0


async def test_a_token_that_the_model_does_not_have_is_refused_and_the_lease_released(worker: PrefillWorker) -> None:
    unknown = replace(REQUEST, prompt_token_ids=(*PROMPT[:-1], 29_106))
    with pytest.raises(InvalidRequest, match="token id 29106 is unknown; the model has 1000 tokens"):
        await worker.prefill(await worker.unit.credit(DEMAND), unknown)
    await worker.until_empty()


async def test_the_blocks_of_a_prompt_that_fails_are_not_shared(tmp_path: Path) -> None:
    async with prefill_worker(tmp_path, UncomputableRunner(after=1), token_budget=16) as worker:
        with pytest.raises(SequenceFailed, match="not finite"):
            await worker.prefill(await worker.unit.credit(DEMAND))
        await worker.until_empty()
        assert worker.unit.state.blocks.count_cached("m", DEMAND.block_hashes) == 0, "its first chunk was computed"


class GatedDevice(InterpretedDevice):
    """A device whose results reach the host only when ``gate`` is open, as on a GPU that is still computing."""

    def __init__(self) -> None:
        super().__init__()
        self.waited_for = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def download(self, tensor: Tensor) -> Callable[[], np.ndarray]:
        read = super().download(tensor)

        def wait() -> np.ndarray:
            self.waited_for.set()
            assert self.gate.wait(60)
            return read()

        return wait


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maximum of a row of NaN
@pytest.mark.skipif(not INTERPRETED, reason="this process compiles kernels")
async def test_a_lease_moves_only_after_the_device_has_computed_the_prompt(tmp_path: Path) -> None:
    """Everything that a prompt enqueues is on one stream, so what was read back last was computed last."""
    device = GatedDevice()
    folder = write_tiny_model(tmp_path / "model", TinyShape(num_layers=1, num_heads=2, num_kv_heads=1))
    runner = device_runner(folder, tmp_path, device, block_size=CONFIG.block_size)
    async with prefill_worker(tmp_path, runner, vocab_size=259) as worker:
        device.waited_for.clear()
        device.gate.clear()
        ref = await worker.unit.credit(DEMAND)
        prefilling = asyncio.create_task(worker.prefill(ref))
        assert await asyncio.to_thread(device.waited_for.wait, 60)
        leases = worker.unit.state.leases
        assert not leases.of_owner(worker.decode.worker), "the KV may not be written yet"
        assert not prefilling.done()
        device.gate.set()
        await prefilling
        assert worker.handed_off().ref.lease_id == ref.lease_id
