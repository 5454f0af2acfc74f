"""The Inference service: one request, one or several answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import grpc

from muxmesh.engine.api import Tokens
from muxmesh.errors import Overloaded
from muxmesh.types import EngineRequest, LengthPrediction
from muxmesh.v1 import inference_pb2, inference_pb2_grpc
from router.attempt import Prefilled
from router.forecast import Forecast
from router.request import Progress
from router.responses import finish_info_of, open_answer, prompt_info_of, response_of, scheduling_of, stopped_by_string
from router.state import RouterState
from router.validation import CheckedRequest, check, check_request_id, complete
from router.work import Outlook, Served, fixed_length

Context = grpc.aio.ServicerContext[Any, Any]
_READ_TOKENS = 1000


@dataclass(slots=True)
class _Part:
    """What is new of one answer, in a message of its own. ``prefilled``: of its prompt."""

    response: inference_pb2.GenerateResponse
    num_tokens: int
    is_last: bool
    prefilled: Prefilled | None = None


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
        self._refuse_overload(checked.num_sequences)
        arrived_at_unix_s = state.clock.unix_s()
        token_ids = await self._tokenize(checked)
        engine_request = complete(checked, request_id, token_ids, arrived_at_unix_s)
        forecast = await self._forecast(checked, engine_request)
        self._refuse_overload(checked.num_sequences)  # a burst may have passed the first look together
        engine_request = self._with_forecast(checked, engine_request, forecast)
        async with aclosing(self._serve(checked, engine_request, forecast, arrived_at_s)) as responses:
            async for response in responses:
                yield response

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        """See the proto."""
        whole = inference_pb2.GenerateResponse()
        outputs: dict[int, inference_pb2.SequenceOutput] = {}
        async with aclosing(self.GenerateStream(request, context)) as responses:
            async for part in responses:
                output = outputs.setdefault(part.outputs.index, inference_pb2.SequenceOutput())
                text, num_tokens = output.text + part.outputs.text, output.num_tokens + part.outputs.num_tokens
                output.MergeFrom(part.outputs)
                output.text, output.num_tokens = text, num_tokens
                part.ClearField("outputs")
                whole.MergeFrom(part)
        whole.outputs.CopyFrom(outputs[0])
        if len(outputs) > 1:
            whole.all_outputs.extend(outputs[index] for index in sorted(outputs))
        return whole

    async def _serve(
        self, checked: CheckedRequest, request: EngineRequest, forecast: Forecast, arrived_at_s: float
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """Every answer's parts; prompt_info in the first message, timings in the last."""
        state = self._state
        counters = state.counters[checked.model.name]
        progress = [Progress() for _ in range(checked.num_sequences)]
        counters.num_running += checked.num_sequences
        counters.prompt_tokens += len(request.prompt_token_ids)
        first_token_at_s: float | None = None
        unfinished = checked.num_sequences
        try:
            async with aclosing(self._answers(checked, request, forecast, progress)) as parts:
                async for part in parts:
                    response = part.response
                    counters.output_tokens += part.num_tokens
                    if first_token_at_s is None:
                        first_token_at_s = state.clock.monotonic_s()
                        response.prompt_info.CopyFrom(prompt_info_of(checked, request, forecast, part.prefilled))
                        if checked.wire.response.scheduling:
                            response.scheduling.CopyFrom(self._scheduling(request, forecast, progress[0], arrived_at_s))
                    if part.is_last:
                        unfinished -= 1
                        counters.num_running -= 1
                    if unfinished == 0:
                        response.timings.CopyFrom(self._timings(progress, arrived_at_s, first_token_at_s))
                    yield response
        finally:
            counters.num_running -= unfinished
            counters.num_finished += unfinished == 0
            counters.num_aborted += unfinished > 0
            counters.num_restarts += sum(one.num_restarts for one in progress)

    def _answers(
        self, checked: CheckedRequest, request: EngineRequest, forecast: Forecast, progress: list[Progress]
    ) -> AsyncGenerator[_Part, None]:
        """The parts of all answers as they come."""
        if len(progress) == 1:
            return self._answer(checked, request, forecast, progress[0])
        return self._several_answers(checked, request, forecast, progress)

    async def _several_answers(
        self, checked: CheckedRequest, request: EngineRequest, forecast: Forecast, progress: list[Progress]
    ) -> AsyncGenerator[_Part, None]:
        """The others begin when the first one's prompt is computed."""
        counters = self._state.counters[checked.model.name]
        arrived: asyncio.Queue[_Part | asyncio.Task[None]] = asyncio.Queue()
        prompt_is_cached = asyncio.Event()

        async def pump(index: int) -> None:
            if index > 0:
                counters.num_held_back += 1
                try:
                    await prompt_is_cached.wait()
                finally:
                    counters.num_held_back -= 1
            sequence = request if index == 0 else _sibling(request, index)
            async with aclosing(self._answer(checked, sequence, forecast, progress[index])) as parts:
                async for part in parts:
                    arrived.put_nowait(part)
                    prompt_is_cached.set()

        pumps = [asyncio.create_task(pump(index)) for index in range(len(progress))]
        try:
            for task in pumps:
                task.add_done_callback(arrived.put_nowait)
            running = len(pumps)
            while running:
                item = await arrived.get()
                if isinstance(item, _Part):
                    yield item
                else:
                    item.result()
                    running -= 1
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _answer(
        self, checked: CheckedRequest, request: EngineRequest, forecast: Forecast, progress: Progress
    ) -> AsyncGenerator[_Part, None]:
        """The parts of one answer; the last has finish_info. How long it got teaches the predictor."""
        answer = open_answer(checked, request)
        prefilled: Prefilled | None = None
        driver = self._state.units[checked.model.unit].driver
        num_tokens, censored = 0, True
        try:
            async with aclosing(driver.run(request, progress)) as events:
                async for event in events:
                    if isinstance(event, Prefilled):
                        prefilled = event
                        continue
                    if isinstance(event, Tokens):
                        delta = answer.take(event.token_ids)
                        response = response_of(checked, request, delta, event.logprobs)
                        is_last = delta.stopped_by is not None
                        if delta.stopped_by is not None:
                            response.outputs.finish_info.CopyFrom(stopped_by_string(answer, delta.stopped_by))
                    else:
                        delta = answer.finish()
                        response, is_last = response_of(checked, request, delta), True
                        response.outputs.finish_info.CopyFrom(finish_info_of(answer, event, delta))
                    num_tokens += len(delta.token_ids)
                    if is_last:
                        ended = response.outputs.finish_info.finish_reason
                        censored = ended == inference_pb2.FinishInfo.LENGTH
                    yield _Part(response, len(delta.token_ids), is_last, prefilled)
                    if is_last:
                        return
        finally:
            self._state.forecaster.observe(forecast, num_tokens, censored)

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

    async def _forecast(self, checked: CheckedRequest, request: EngineRequest) -> Forecast:
        wire = checked.wire
        if (fixed := fixed_length(request.stopping, bool(wire.stopping.stop_strings))) is not None:
            return Forecast(LengthPrediction(fixed, fixed), "fixed")
        text = await self._text_of(checked, request)
        hint = wire.expected_output_tokens if wire.HasField("expected_output_tokens") else None
        return await self._state.forecaster.predict(text, request.model, request.cache_salt, hint)

    async def _text_of(self, checked: CheckedRequest, request: EngineRequest) -> str:
        """What the predictor reads: the prompt, and of a conversation what people said last."""
        wire = checked.wire
        if wire.HasField("text"):
            return wire.text
        if wire.HasField("chat"):
            return next((m.content for m in reversed(wire.chat.messages) if m.role == "user"), "")
        ids = request.prompt_token_ids[-_READ_TOKENS:]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._state.tokenizing, checked.model.text.decode, ids, True)

    def _with_forecast(self, checked: CheckedRequest, request: EngineRequest, forecast: Forecast) -> EngineRequest:
        unit, name = self._state.units[checked.model.unit], request.model
        served = Served(name, unit.credits.costs.get(name), checked.model.config.prefill_token_budget)
        outlook = Outlook(forecast.prediction, forecast.source, request.stopping)
        standing = unit.work.expect(
            request.standing, outlook, len(request.prompt_token_ids), served, unit.credits.num_waiting(name)
        )
        return replace(request, prediction=outlook.prediction, standing=standing)

    def _scheduling(
        self, request: EngineRequest, forecast: Forecast, progress: Progress, arrived_at_s: float
    ) -> inference_pb2.SchedulingInfo:
        waited_s = progress.queued_s(arrived_at_s)
        return scheduling_of(request, forecast, self._state.order, progress.credit, waited_s)

    def _refuse_overload(self, num_answers: int) -> None:
        state = self._state
        waiting = sum(
            state.units[model.unit].credits.num_waiting(model.name) + state.counters[model.name].num_held_back
            for model in state.models.values()
        )
        limit = state.config.max_waiting_requests
        if waiting + num_answers > limit:
            raise Overloaded(f"{waiting} requests are waiting, at most {limit}; each answer counts")

    def _timings(
        self, progress: list[Progress], arrived_at_s: float, first_token_at_s: float
    ) -> inference_pb2.RequestTimings:
        return inference_pb2.RequestTimings(
            queue_s=progress[0].queued_s(arrived_at_s),
            ttft_s=first_token_at_s - arrived_at_s,
            e2e_s=self._state.clock.monotonic_s() - arrived_at_s,
            num_restarts=sum(one.num_restarts for one in progress),
            router_s=max(0.0, first_token_at_s - arrived_at_s - progress[0].waited_s),
        )


def _sibling(request: EngineRequest, index: int) -> EngineRequest:
    """Another answer to the same prompt, which the first answer's request has scored and left in the cache."""
    sampling = replace(request.sampling, prompt_logprobs=None)
    return replace(request, sequence=index, sampling=sampling, bypass_prefix_cache=False)


def _request_id(request: inference_pb2.GenerateRequest, context: Context) -> str:
    if request.request_id:
        return request.request_id
    for key, value in context.invocation_metadata() or ():
        if key == "x-request-id":
            request_id = value if isinstance(value, str) else value.decode(errors="replace")
            check_request_id(request_id)
            return request_id
    return ""
