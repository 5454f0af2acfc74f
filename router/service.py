"""The public gRPC edge: Inference and Mesh."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import grpc

from muxmesh import __version__
from muxmesh.clock import Clock
from muxmesh.config.schema import RouterConfig
from muxmesh.engine.api import Finished, PromptScored, Tokens
from muxmesh.errors import Overloaded
from muxmesh.internal.v1 import kvstore_pb2, kvstore_pb2_grpc
from muxmesh.registry import Registry
from muxmesh.rpc.status import from_rpc_error
from muxmesh.types import Candidate, EngineRequest, Finish, FinishReason, TokenLogprobs
from muxmesh.v1 import inference_pb2, inference_pb2_grpc, mesh_pb2, mesh_pb2_grpc
from router.answer import Answer, Delta
from router.credits import UnitCredits
from router.request import Progress, RequestDriver
from router.served_model import ServedModel, find_model
from router.stop_strings import StopStrings
from router.validation import CheckedRequest, check, check_request_id, complete

Context = grpc.aio.ServicerContext[Any, Any]
_STATUS_TIMEOUT_S = 2.0


@dataclass(slots=True)
class ModelCounters:
    """Of one model since the router started."""

    num_running: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_restarts: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class UnitLink:
    """One unit as the router reaches it."""

    credits: UnitCredits
    driver: RequestDriver
    kvstore: kvstore_pb2_grpc.KvStoreServiceAsyncStub


@dataclass(frozen=True, slots=True)
class RouterState:
    """What both services share."""

    config: RouterConfig
    models: Mapping[str, ServedModel]
    units: Mapping[str, UnitLink]
    clock: Clock
    rng: random.Random
    tokenizing: ThreadPoolExecutor
    registry: Registry
    counters: defaultdict[str, ModelCounters] = field(default_factory=lambda: defaultdict(ModelCounters))


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Generate and GenerateStream."""

    def __init__(self, state: RouterState) -> None:
        self._state = state

    async def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """See the proto."""
        state, arrived_at_s = self._state, self._state.clock.monotonic_s()
        checked = check(request, state.models, state.config.max_prompt_bytes, state.rng.getrandbits(63))
        request_id = _request_id(request, context) or f"{state.rng.getrandbits(64):016x}"
        await context.send_initial_metadata((("x-request-id", request_id),))
        self._refuse_overload()
        token_ids = await self._tokenize(checked)
        self._refuse_overload()  # a burst may have passed the first look together
        engine_request = complete(checked, request_id, token_ids, state.clock.unix_s())
        async with aclosing(self._serve(checked, engine_request, arrived_at_s)) as responses:
            async for response in responses:
                yield response

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        """See the proto."""
        whole = inference_pb2.GenerateResponse()
        async with aclosing(self.GenerateStream(request, context)) as responses:
            async for part in responses:
                text = whole.outputs.text + part.outputs.text
                num_tokens = whole.outputs.num_tokens + part.outputs.num_tokens
                whole.MergeFrom(part)
                whole.outputs.text, whole.outputs.num_tokens = text, num_tokens
        return whole

    async def _serve(
        self, checked: CheckedRequest, request: EngineRequest, arrived_at_s: float
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        state, model = self._state, checked.model
        counters, progress = state.counters[model.name], Progress()
        answer = _open_answer(checked, request)
        counters.num_running += 1
        counters.prompt_tokens += len(request.prompt_token_ids)
        prompt_info: inference_pb2.PromptInfo | None = _prompt_info(checked, request)
        prompt_logprobs: list[inference_pb2.TokenLogprobs] = []
        first_token_at_s = arrived_at_s
        finished = False
        try:
            async with aclosing(state.units[model.unit].driver.run(request, progress)) as events:
                async for event in events:
                    if isinstance(event, PromptScored):
                        prompt_logprobs = [_logprobs(place) for place in event.logprobs]
                        continue
                    if isinstance(event, Tokens):
                        delta = answer.take(event.token_ids)
                        counters.output_tokens += len(delta.token_ids)
                        if prompt_info is not None:
                            first_token_at_s = state.clock.monotonic_s()
                            prompt_info.token_logprobs.extend(prompt_logprobs)
                        response = inference_pb2.GenerateResponse(
                            prompt_info=prompt_info, outputs=_output(checked, delta, event.logprobs)
                        )
                        prompt_info = None
                        if delta.stopped_by is None:
                            yield response
                            continue
                        finish_info = _stopped_by_string(answer, delta.stopped_by)
                    else:
                        delta = answer.finish()
                        response = inference_pb2.GenerateResponse(outputs=_output(checked, delta))
                        finish_info = _finish_info(answer, event, delta, request)
                    response.outputs.finish_info.CopyFrom(finish_info)
                    response.timings.CopyFrom(self._timings(progress, arrived_at_s, first_token_at_s))
                    finished = True
                    yield response
                    return
        finally:
            counters.num_running -= 1
            counters.num_finished += finished
            counters.num_aborted += not finished
            counters.num_restarts += progress.num_restarts

    async def _tokenize(self, checked: CheckedRequest) -> list[int]:
        """Off the event loop: a long prompt takes milliseconds, and the tokenizer releases the GIL."""
        wire, text = checked.wire, checked.model.text
        if wire.HasField("token_ids"):
            return list(wire.token_ids.ids)
        loop = asyncio.get_running_loop()
        if wire.HasField("text"):
            return await loop.run_in_executor(self._state.tokenizing, text.encode, wire.text, True)
        messages = [{"role": message.role, "content": message.content} for message in wire.chat.messages]
        return await loop.run_in_executor(
            self._state.tokenizing, lambda: text.encode(text.render_chat(messages), False)
        )

    def _refuse_overload(self) -> None:
        waiting = sum(
            self._state.units[model.unit].credits.num_waiting(model.name) for model in self._state.models.values()
        )
        limit = self._state.config.max_waiting_requests
        if waiting >= limit:
            raise Overloaded(f"{waiting} requests are waiting, at most {limit}")

    def _timings(
        self, progress: Progress, arrived_at_s: float, first_token_at_s: float
    ) -> inference_pb2.RequestTimings:
        return inference_pb2.RequestTimings(
            queue_s=(progress.credited_at_s or arrived_at_s) - arrived_at_s,
            ttft_s=first_token_at_s - arrived_at_s,
            e2e_s=self._state.clock.monotonic_s() - arrived_at_s,
            num_restarts=progress.num_restarts,
        )


class MeshService(mesh_pb2_grpc.MeshServicer):
    """ListModels, GetModelInfo, GetStatus."""

    def __init__(self, state: RouterState) -> None:
        self._state = state

    async def ListModels(self, request: mesh_pb2.ListModelsRequest, context: Context) -> mesh_pb2.ListModelsResponse:
        """See the proto."""
        return mesh_pb2.ListModelsResponse(models=[_model_info(model) for model in self._state.models.values()])

    async def GetModelInfo(
        self, request: mesh_pb2.GetModelInfoRequest, context: Context
    ) -> mesh_pb2.GetModelInfoResponse:
        """See the proto."""
        return mesh_pb2.GetModelInfoResponse(model=_model_info(find_model(self._state.models, request.model)))

    async def GetStatus(self, request: mesh_pb2.GetStatusRequest, context: Context) -> mesh_pb2.GetStatusResponse:
        """See the proto. A part that does not answer is shown as not connected."""
        processes = await self._state.registry.processes()
        return mesh_pb2.GetStatusResponse(
            version=__version__,
            models=[self._router_status(model) for model in self._state.models.values()],
            units=[await self._unit_status(name) for name in self._state.units],
            processes=[
                mesh_pb2.ProcessStatus(
                    name=record.name,
                    pid=record.pid,
                    address=record.address,
                    started_at_unix_s=record.started_at_unix_s,
                    num_restarts=num_restarts,
                )
                for record, num_restarts in processes or ()
            ],
            redis_connected=processes is not None,
        )

    def _router_status(self, model: ServedModel) -> mesh_pb2.RouterModelStatus:
        counters = self._state.counters[model.name]
        num_waiting = self._state.units[model.unit].credits.num_waiting(model.name)
        return mesh_pb2.RouterModelStatus(
            model=model.name,
            num_requests_waiting=num_waiting,
            num_requests_running=counters.num_running - num_waiting,
            num_requests_finished=counters.num_finished,
            num_requests_aborted=counters.num_aborted,
            num_restarts=counters.num_restarts,
            prompt_tokens=counters.prompt_tokens,
            output_tokens=counters.output_tokens,
        )

    async def _unit_status(self, name: str) -> mesh_pb2.UnitStatus:
        request = kvstore_pb2.GetUnitStatusRequest()
        try:
            return (await self._state.units[name].kvstore.GetUnitStatus(request, timeout=_STATUS_TIMEOUT_S)).unit
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise from_rpc_error(error) from error  # its integrity is broken: that must be seen
        return mesh_pb2.UnitStatus(unit=name, connected=False)


def _request_id(request: inference_pb2.GenerateRequest, context: Context) -> str:
    if request.request_id:
        return request.request_id
    for key, value in context.invocation_metadata() or ():
        if key == "x-request-id":
            request_id = value if isinstance(value, str) else value.decode(errors="replace")
            check_request_id(request_id)
            return request_id
    return ""


def _open_answer(checked: CheckedRequest, request: EngineRequest) -> Answer:
    response, stopping = checked.wire.response, checked.wire.stopping
    skip_special = response.skip_special_tokens if response.HasField("skip_special_tokens") else True
    needs_text = _wants_text(response) or stopping.stop_strings
    return Answer(
        request.stopping,
        checked.model.text.detokenizer(skip_special) if needs_text else None,
        StopStrings(stopping.stop_strings, stopping.include_stop_strings),
        stopping.include_stop_strings,
    )


def _wants_text(response: inference_pb2.ResponseOptions) -> bool:
    return response.output_text if response.HasField("output_text") else True


def _prompt_info(checked: CheckedRequest, request: EngineRequest) -> inference_pb2.PromptInfo:
    wanted = checked.wire.response.prompt_token_ids
    return inference_pb2.PromptInfo(
        num_prompt_tokens=len(request.prompt_token_ids),
        token_ids=request.prompt_token_ids if wanted else (),
        seed=request.sampling.seed,
    )


def _output(
    checked: CheckedRequest, delta: Delta, logprobs: Sequence[TokenLogprobs] = ()
) -> inference_pb2.SequenceOutput:
    response = checked.wire.response
    return inference_pb2.SequenceOutput(
        text=delta.text if _wants_text(response) else "",
        num_tokens=len(delta.token_ids),
        token_ids=delta.token_ids if response.output_token_ids else (),
        token_logprobs=[_logprobs(place) for place in logprobs[: len(delta.token_ids)]],
    )


def _logprobs(place: TokenLogprobs) -> inference_pb2.TokenLogprobs:
    def entry(candidate: Candidate) -> inference_pb2.TokenLogprob:
        return inference_pb2.TokenLogprob(token_id=candidate.token_id, logprob=candidate.logprob, rank=candidate.rank)

    return inference_pb2.TokenLogprobs(chosen=entry(place.chosen), top=[entry(candidate) for candidate in place.top])


def _stopped_by_string(answer: Answer, stop: str) -> inference_pb2.FinishInfo:
    return inference_pb2.FinishInfo(
        num_output_tokens=len(answer.token_ids), finish_reason=inference_pb2.FinishInfo.STOP, stop_string=stop
    )


def _finish_info(answer: Answer, event: Finished, delta: Delta, request: EngineRequest) -> inference_pb2.FinishInfo:
    if delta.stopped_by is not None:
        return _stopped_by_string(answer, delta.stopped_by)
    finish: Finish = event.finish
    info = inference_pb2.FinishInfo(num_output_tokens=len(answer.token_ids))
    if finish.reason is FinishReason.LENGTH:
        info.finish_reason = inference_pb2.FinishInfo.LENGTH
    else:
        info.finish_reason = inference_pb2.FinishInfo.STOP
        assert finish.token_id is not None
        if finish.reason is FinishReason.EOS:
            info.eos_token_id = finish.token_id
        else:
            info.stop_token_id = finish.token_id
    return info


def _model_info(model: ServedModel) -> mesh_pb2.ModelInfo:
    config, spec = model.config, model.spec
    return mesh_pb2.ModelInfo(
        name=model.name,
        architecture=spec.architecture,
        engine=config.engine,
        unit=model.unit,
        max_model_len=model.max_model_len,
        default_max_new_tokens=config.default_max_new_tokens,
        vocab_size=spec.vocab_size,
        eos_token_ids=sorted(spec.eos_token_ids),
        has_chat_template=model.text.has_chat_template,
        kv_bytes_per_token=spec.kv_shape(config.block_size, config.dtype).kv_bytes_per_token,
        dtype=config.dtype,
    )
