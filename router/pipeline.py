"""The path of a request through the router: a `GenerationRequest` in, `OutputDelta`s out.

Knows no wire format, no workers and no addresses.

validate → tokenize → resolve → predict the length → for each sequence: attempts (`sequence_driver`) → deltas
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from muxmesh.clock import Clock
from muxmesh.config.schema import RouterConfig
from muxmesh.models.token_texts import TokenTexts
from muxmesh.predictor.start_order import StartOrder
from muxmesh.scheduling_policy import SchedulingPolicy
from muxmesh.types import EngineRequest, LengthPrediction
from router.expected_work import ExpectedOutput, ModelService, fixed_length
from router.generation import (
    ChatPrompt,
    FinishKind,
    GenerationRequest,
    ModelCounters,
    OutputDelta,
    Prompt,
    TextPrompt,
    TokenizedPrompt,
)
from router.generation_reports import prompt_report, scheduling_report, timings_report
from router.length_forecast import LengthForecast, LengthForecaster
from router.prompt_tokenizer import PromptTokenizer
from router.queue_limit import QueueLimit, WaitingSequences
from router.quotas import NO_QUOTAS, Quotas, Settles
from router.request_metrics import RequestMetrics
from router.request_record import RequestRecord
from router.request_validation import (
    check_count,
    check_prompt,
    check_token_ids,
    check_tokenized,
    resolve,
    validate,
)
from router.sequence_driver import Progress, SequenceDriver
from router.sequence_output import SequenceOutput
from router.served_models import ServedModel, ServedModels
from router.slo_counts import verdict_of
from router.stop_strings import StopStrings
from router.tickets import Newcomer
from router.units import ChosenUnit, Units

_MAX_PREDICTOR_TOKENS = 1000
_MAX_LISTED_TOKENS = 65_536
"""Tokens of a prompt that `tokenize` returns, or as many as the context holds: more would hold up the event loop."""
_SEED_BITS = 53
"""Sampled seeds are exact as doubles, which is what JavaScript and jq read numbers as."""


class _KnownLength(NamedTuple):
    """The length of an output, for the predictor."""

    forecast: LengthForecast
    num_tokens: int
    is_censored: bool


@dataclass(slots=True)
class _Generation:
    """A request in progress. ``progress`` has one entry for each sequence."""

    request: GenerationRequest
    model: ServedModel
    engine_request: EngineRequest
    forecast: LengthForecast
    record: RequestRecord
    reservation: Settles
    waiting: WaitingSequences
    chosen: ChosenUnit
    """For the first attempt of the first sequence."""
    progress: list[Progress] = field(init=False)

    def __post_init__(self) -> None:
        self.progress = [Progress() for _ in range(self.request.num_sequences)]


class GenerationPipeline:
    """Serves requests. Owns the counters of each model. Called on one event loop."""

    def __init__(
        self,
        models: ServedModels,
        units: Units,
        driver: SequenceDriver,
        forecaster: LengthForecaster,
        policy: SchedulingPolicy,
        config: RouterConfig,
        clock: Clock,
        rng: random.Random,
        tokenizer: PromptTokenizer,
        metrics: RequestMetrics,
        queue_limit: QueueLimit,
        quotas: Quotas = NO_QUOTAS,
    ) -> None:
        """``rng`` samples seeds."""
        self.counters: defaultdict[str, ModelCounters] = defaultdict(ModelCounters)
        self._start_orders: defaultdict[str, StartOrder[_KnownLength]] = defaultdict(StartOrder)
        self._models = models
        self._units = units
        self._driver = driver
        self._forecaster = forecaster
        self._policy = policy
        self._config = config
        self._clock = clock
        self._rng = rng
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._queue_limit = queue_limit
        self._quotas = quotas

    def model_name(self, name: str) -> str:
        """The name of the model that a request for ``name`` means. Raises InvalidRequest or ModelNotFound."""
        return self._models.find(name).name

    def validate(self, request: GenerationRequest) -> None:
        """Raises InvalidRequest, ModelNotFound or PermissionDenied for a request that can never be served."""
        validate(request, self._models.find(request.model), self._config.max_prompt_bytes)

    async def start(self, request: GenerationRequest, record: RequestRecord) -> AsyncGenerator[OutputDelta, None]:
        """Prepares a validated request; returns the deltas of its sequences. Closing these aborts the request.

        Keeps ``record``, which has the time of the arrival, up to date. Raises Overloaded, QuotaExceeded, Unavailable
        or InvalidRequest. The deltas raise the error of a sequence's last attempt.
        """
        model = self._models.find(request.model)
        record.max_wait_s = self._policy.max_wait_s
        if model.config.slo is not None:
            record.slo = self._units.least_loaded(model.name).request_slo(model.name)
        self._refuse_overload(request, model.name)
        arrived_at_unix_s = self._clock.unix_s()
        max_tokens = None if request.truncate_prompt_tokens is not None else model.limits.max_model_len - 1
        waiting = self._queue_limit.enter(request.tenant.tenant_id, request.num_sequences, self._clock.monotonic_s())
        reservation: Settles | None = None
        try:
            with self._preparing(model.name, request.num_sequences):
                token_ids = await self._tokenizer.encode(request.prompt, model, max_tokens=max_tokens)
                seed = self._rng.getrandbits(_SEED_BITS)
                engine_request = resolve(request, model, token_ids, seed, arrived_at_unix_s)
                forecast = await self._predict_length(request, model, engine_request)
                expected = _expected_tokens(request, engine_request, forecast)
                engine_request, chosen = self._prepared(model, engine_request, forecast, record)
                self._refuse_lateness(request, chosen.num_before(engine_request))
                reservation = await self._quotas.reserve(request.tenant, expected)
        except BaseException:
            waiting.end(self._clock.monotonic_s())
            if reservation is not None:
                reservation.settle(0, 0)
            raise
        generation = _Generation(request, model, engine_request, forecast, record, reservation, waiting, chosen)
        return self._serve(generation)

    def _prepared(
        self, model: ServedModel, engine_request: EngineRequest, forecast: LengthForecast, record: RequestRecord
    ) -> tuple[EngineRequest, ChosenUnit]:
        """The request with its expected work and its SLO, and the unit for its first attempt."""
        record.source, record.predicted_tokens = forecast.source, forecast.prediction.p50_tokens
        self._metrics.of(model.name).num_predictions[forecast.source] += 1
        chosen = self._units.choose(replace(engine_request, prediction=forecast.prediction))
        engine_request = self._with_expected_work(chosen, engine_request, forecast)
        chosen = chosen.with_prediction_of(engine_request)
        if record.slo is not None:
            engine_request = replace(engine_request, slo=record.slo.targets(len(engine_request.prompt_token_ids)))
        return engine_request, chosen

    async def tokenize(
        self, model_name: str, prompt: Prompt, add_special_tokens: bool | None, with_texts: bool
    ) -> TokenizedPrompt:
        """The tokens of a prompt, which may be longer than the context. Raises InvalidRequest or ModelNotFound."""
        model = self._models.find(model_name)
        check_prompt(prompt, model, self._config.max_prompt_bytes)
        most = max(model.limits.max_model_len, _MAX_LISTED_TOKENS)
        token_ids = await self._tokenizer.encode(prompt, model, add_special_tokens, most)
        check_tokenized(prompt, len(token_ids), most)
        texts = await self._tokenizer.texts(token_ids, model) if with_texts else ()
        return TokenizedPrompt(token_ids, model.limits.max_model_len, texts)

    async def detokenize(self, model_name: str, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of token ids, at most as many as the context holds. Raises InvalidRequest or ModelNotFound."""
        model = self._models.find(model_name)
        check_count("token_ids", len(token_ids), model.limits.max_model_len)
        check_token_ids("token_ids", token_ids, model)
        return await self._tokenizer.decode(token_ids, model, skip_special_tokens)

    def token_texts(self, model_name: str) -> TokenTexts:
        """The texts of single tokens. Raises ModelNotFound."""
        return self._models.find(model_name).text.token_texts

    def num_waiting(self, model: str) -> int:
        """Sequences of ``model`` that wait for their prompt's tokens, a credit, or the first one of their request."""
        counters = self.counters[model]
        return self._units.num_queued(model) + counters.num_held_back + counters.num_preparing

    @contextmanager
    def _preparing(self, model: str, num_sequences: int) -> Iterator[None]:
        """Counts sequences whose prompt is tokenized as waiting ones."""
        counters = self.counters[model]
        counters.num_running += num_sequences
        counters.num_preparing += num_sequences
        try:
            yield
        finally:
            counters.num_preparing -= num_sequences
            counters.num_running -= num_sequences

    async def _serve(self, generation: _Generation) -> AsyncGenerator[OutputDelta, None]:
        """The deltas of all sequences: the first one with the reports, the last one with the timings."""
        counters, progress, record = self.counters[generation.model.name], generation.progress, generation.record
        metrics, num_unfinished = self._metrics.of(generation.model.name), len(progress)
        counters.num_running += num_unfinished
        counters.prompt_tokens += len(generation.engine_request.prompt_token_ids)
        record.begin(len(generation.engine_request.prompt_token_ids), progress, metrics.gap_s.observe)
        first_token_at_s: float | None = None
        try:
            async with aclosing(self._sequences(generation)) as deltas:
                async for delta in deltas:
                    if num_tokens := len(delta.new.token_ids):
                        counters.output_tokens += num_tokens
                        record.add_tokens(delta.index, num_tokens, self._clock.monotonic_s())
                    if first_token_at_s is None:
                        first_token_at_s = record.first_token_at_s = self._clock.monotonic_s()
                        metrics.first_token(record, first_token_at_s)
                        delta = self._with_reports(delta, generation)  # noqa: PLW2901
                    if delta.new.finish is not None:
                        record.finishes.append(delta.new.finish.kind)
                        num_unfinished -= 1
                        counters.num_running -= 1
                    if num_unfinished == 0:
                        now_s = self._clock.monotonic_s()
                        times = (record.arrived_at_s, first_token_at_s, now_s)
                        record.verdict = verdict_of(record, "OK", now_s)
                        timings = timings_report(progress, *times, record.verdict)
                        execution = record.execution(now_s) if generation.request.output.scheduling else None
                        delta = replace(delta, timings=timings, execution=execution)  # noqa: PLW2901
                    yield delta
        finally:
            counters.num_running -= num_unfinished
            counters.num_finished += num_unfinished == 0
            counters.num_aborted += num_unfinished > 0
            counters.num_restarts += sum(one.num_restarts for one in progress)
            was_computed = first_token_at_s is not None or any(one.prefilled is not None for one in progress)
            num_prompt_tokens = record.num_prompt_tokens if was_computed else 0
            generation.waiting.end(self._clock.monotonic_s())
            generation.reservation.settle(num_prompt_tokens, record.num_output_tokens)

    def _sequences(self, generation: _Generation) -> AsyncGenerator[OutputDelta, None]:
        """The deltas of all sequences, in the order of their arrival."""
        if len(generation.progress) == 1:
            return self._sequence(generation, 0)
        return self._several_sequences(generation)

    async def _several_sequences(self, generation: _Generation) -> AsyncGenerator[OutputDelta, None]:
        """The first sequence computes the prompt; then the others start, and find the prompt in the prefix cache."""
        counters = self.counters[generation.model.name]
        arrived: asyncio.Queue[OutputDelta | asyncio.Task[None]] = asyncio.Queue()
        prompt_is_cached = asyncio.Event()

        async def pump(index: int) -> None:
            if index > 0:
                counters.num_held_back += 1
                try:
                    await prompt_is_cached.wait()
                finally:
                    counters.num_held_back -= 1
            async with aclosing(self._sequence(generation, index)) as deltas:
                async for delta in deltas:
                    arrived.put_nowait(delta)
                    prompt_is_cached.set()

        pumps = [asyncio.create_task(pump(index)) for index in range(len(generation.progress))]
        try:
            for task in pumps:
                task.add_done_callback(arrived.put_nowait)
            num_running = len(pumps)
            while num_running:
                item = await arrived.get()
                if isinstance(item, OutputDelta):
                    yield item
                else:
                    item.result()
                    num_running -= 1
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _sequence(self, generation: _Generation, index: int) -> AsyncGenerator[OutputDelta, None]:
        """The deltas of one sequence. Its length is reported to the predictor, even if the sequence is aborted."""
        lengths, number = self._start_orders[generation.model.name], 0
        request = generation.engine_request if index == 0 else _sibling(generation.engine_request, index)
        output = _open_output(generation.request, generation.model, request)
        try:
            first = generation.chosen if index == 0 else None
            async with aclosing(self._driver.run(request, output, generation.progress[index], first)) as deltas:
                async for delta in deltas:
                    if not number:
                        number = lengths.start()
                        generation.waiting.start(self._clock.monotonic_s())
                    yield OutputDelta(index, delta)
        finally:
            if number:
                is_censored = output.finish is None or output.finish.kind is FinishKind.LENGTH
                known = _KnownLength(generation.forecast, len(output.token_ids), is_censored)
                for one in lengths.end(number, known):
                    self._forecaster.observe(*one)

    async def _predict_length(
        self, request: GenerationRequest, model: ServedModel, engine_request: EngineRequest
    ) -> LengthForecast:
        fixed = fixed_length(engine_request.stopping, bool(request.stopping.stop_strings))
        if fixed is not None:
            return LengthForecast(LengthPrediction(fixed, fixed), "fixed")
        text = await self._predictor_text(request, model, engine_request)
        hint_tokens = request.expected_output_tokens
        tenant = engine_request.tenant or engine_request.cache_salt  # without API keys, clients differ by their salt
        return await self._forecaster.predict(text, model.name, tenant, hint_tokens)

    async def _predictor_text(
        self, request: GenerationRequest, model: ServedModel, engine_request: EngineRequest
    ) -> str:
        """The text that the predictor reads: the prompt, or the last user message of a conversation."""
        prompt = request.prompt
        if isinstance(prompt, TextPrompt):
            return prompt.text
        if isinstance(prompt, ChatPrompt):
            return next((m.content for m in reversed(prompt.messages) if m.role == "user"), "")
        token_ids = engine_request.prompt_token_ids[-_MAX_PREDICTOR_TOKENS:]
        return await self._tokenizer.decode(token_ids, model, True)

    @staticmethod
    def _with_expected_work(chosen: ChosenUnit, request: EngineRequest, forecast: LengthForecast) -> EngineRequest:
        unit, name = chosen.link, request.model
        config = unit.models[name].config
        service = ModelService(name, unit.admission.costs.get(name), config.step_token_budget, config.max_num_seqs)
        expected = ExpectedOutput(forecast.prediction, forecast.source, request.stopping)
        known = unit.expected_work.expect(
            request.scheduling, expected, len(request.prompt_token_ids), service, unit.admission.num_queued(name)
        )
        return replace(request, prediction=known.prediction, scheduling=known.scheduling)

    def _with_reports(self, delta: OutputDelta, generation: _Generation) -> OutputDelta:
        request, forecast = generation.engine_request, generation.forecast
        delta = replace(delta, prompt=prompt_report(request, forecast, generation.progress[delta.index]))
        if not generation.request.output.scheduling:
            return delta
        arrived_at_s = generation.record.arrived_at_s
        report = scheduling_report(request, forecast, generation.progress[0], arrived_at_s, self._policy)
        return replace(delta, scheduling=report)

    def _refuse_overload(self, request: GenerationRequest, model: str) -> None:
        waiting = {served.name: self.num_waiting(served.name) for served in self._models}
        newcomer = Newcomer(model, request.tenant.tenant_id, request.num_sequences, request.ticket)
        self._queue_limit.check(newcomer, waiting, self._clock.monotonic_s(), self._clock.unix_s())

    def _refuse_lateness(self, request: GenerationRequest, num_before: int) -> None:
        """Raises Overloaded if the request would start after its deadline. ``num_before``: queued ones before it."""
        now_s = self._clock.monotonic_s()
        self._queue_limit.check_deadline(num_before, request.deadline_s - now_s, now_s)


def _expected_tokens(request: GenerationRequest, engine_request: EngineRequest, forecast: LengthForecast) -> int:
    """Prompt and expected output tokens of all sequences, by the 90th percentile of the predicted length."""
    stopping = engine_request.stopping
    output_tokens = min(max(forecast.prediction.p90_tokens, stopping.min_new_tokens, 1), stopping.max_new_tokens)
    return len(engine_request.prompt_token_ids) + request.num_sequences * math.ceil(output_tokens)


def _sibling(request: EngineRequest, index: int) -> EngineRequest:
    """A further sequence of the prompt: it uses the cached prompt and does not score it again."""
    sampling = replace(request.sampling, prompt_logprobs=None)
    return replace(request, sequence_index=index, sampling=sampling, bypass_prefix_cache=False)


def _open_output(request: GenerationRequest, model: ServedModel, engine_request: EngineRequest) -> SequenceOutput:
    stopping, output = request.stopping, request.output
    needs_text = output.text or stopping.stop_strings
    prompt_ids = engine_request.prompt_token_ids
    return SequenceOutput(
        engine_request.stopping,
        model.text.detokenizer(output.skip_special_tokens, prompt_ids) if needs_text else None,
        StopStrings(stopping.stop_strings, stopping.include_stop_strings),
        stopping.include_stop_strings,
    )
