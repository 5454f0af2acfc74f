"""The pipeline with a real tokenizer, driver, forecaster and unit link; only attempts and credits are scripted."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from muxmesh.clock import ManualClock
from muxmesh.config.schema import RouterConfig
from muxmesh.config.slo_config import SloConfig
from muxmesh.engine.api import Finished, Tokens
from muxmesh.errors import EngineFailed, InternalError, InvalidRequest, ModelNotFound, Overloaded, WorkerLost
from muxmesh.execution import Execution, PreemptionReason
from muxmesh.models.chat_template import ChatTemplate
from muxmesh.models.tokenizer import TextModel, byte_tokenizer
from muxmesh.predictor.length_predictor import COLD_TOKENS, LengthPredictor
from muxmesh.scheduling_policy import FCFS
from muxmesh.slo import RequestSlo
from muxmesh.step_cost import UNMEASURED, ModelCosts, StepCost
from muxmesh.types import Candidate, EngineRequest, Finish, FinishReason, Sampling, TokenLogprobs
from router.attempt import Prefilled, Reported
from router.generation import (
    ChatMessage,
    ChatPrompt,
    FinishKind,
    GenerationRequest,
    ModelCounters,
    OutputDelta,
    OutputFinish,
    OutputOptions,
    Prompt,
    StoppingOptions,
    TextPrompt,
    TokensPrompt,
)
from router.request_record import RequestRecord
from tests.support.pipeline_parts import (
    EOS,
    PipelineParts,
    Script,
    Step,
    pipeline_parts,
    served_model,
    tokens_of,
    until,
    writes,
)

REQUEST = GenerationRequest("m", TextPrompt("hello"), request_id="r", seed=3)
END = Finished(Finish(FinishReason.LENGTH))


async def run(parts: PipelineParts, request: GenerationRequest, arrived_at_s: float = 100.0) -> list[OutputDelta]:
    parts.pipeline.validate(request)
    return [delta async for delta in await parts.pipeline.start(request, RequestRecord("r", arrived_at_s))]


async def run_alone(request: GenerationRequest, script: Script, **options: Any) -> list[OutputDelta]:
    async with pipeline_parts(script, **options) as parts:
        return await run(parts, request)


def text_of(deltas: list[OutputDelta], index: int = 0) -> str:
    return "".join(delta.new.text for delta in deltas if delta.index == index)


async def test_a_request_becomes_deltas_that_end_with_its_finish() -> None:
    deltas = await run_alone(REQUEST, writes("world"))
    assert text_of(deltas) == "world"
    assert [token for delta in deltas for token in delta.new.token_ids] == list(tokens_of("world"))
    assert [delta.new.finish for delta in deltas] == [None] * 5 + [OutputFinish(FinishKind.LENGTH, 5)]


CHAT = ChatPrompt((ChatMessage("system", "Be brief."), ChatMessage("user", "Hi"), ChatMessage("assistant", "Yes")))


@pytest.mark.parametrize(
    ("prompt", "tokenized"),
    [
        (TextPrompt("hé"), "hé"),
        (TokensPrompt([40, 41]), None),
        (CHAT, "system: Be brief.\nuser: Hi\nassistant: Yes\nassistant: "),
    ],
)
async def test_the_workers_get_the_tokens_of_the_prompt(prompt: Prompt, tokenized: str | None) -> None:
    async with pipeline_parts(writes("x")) as parts:
        (first, *_) = await run(parts, replace(REQUEST, prompt=prompt))
    expected = (40, 41) if tokenized is None else tokens_of(tokenized)
    assert parts.attempts.requests[0].prompt_token_ids == expected
    assert first.prompt is not None and first.prompt.token_ids == expected


async def test_only_a_text_prompt_gets_the_tokenizer_s_special_tokens() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 1)])
    model = served_model(text=TextModel(tokenizer, ChatTemplate("{{ messages[0].content }}", {})))
    async with pipeline_parts(writes("x"), model) as parts:
        for prompt in (TextPrompt("hi"), ChatPrompt((ChatMessage("user", "hi"),))):
            await run(parts, replace(REQUEST, prompt=prompt))
    assert [one.prompt_token_ids for one in parts.attempts.requests] == [(1, *tokens_of("hi")), tokens_of("hi")]


async def test_a_truncated_prompt_is_reported_and_counted_as_it_was_computed() -> None:
    async with pipeline_parts(writes("x")) as parts:
        (first, *_) = await run(parts, replace(REQUEST, truncate_prompt_tokens=2))
    assert first.prompt is not None and first.prompt.token_ids == tokens_of("lo")
    assert parts.pipeline.counters["m"].prompt_tokens == 2


async def test_the_seed_is_the_client_s_or_the_router_s_and_is_reported() -> None:
    async with pipeline_parts(writes("x")) as parts:
        given = await run(parts, REQUEST)
        sampled = await run(parts, replace(REQUEST, seed=None))
    rng = random.Random(7)
    seeds = [delta.prompt.seed for delta in (given[0], sampled[0]) if delta.prompt]
    assert seeds == [3, [rng.getrandbits(53), rng.getrandbits(53)][1]]
    assert [request.sampling.seed for request in parts.attempts.requests] == seeds


@pytest.mark.parametrize(
    ("finish", "stop_strings", "expected", "text"),
    [
        (Finish(FinishReason.LENGTH), (), OutputFinish(FinishKind.LENGTH, 5), "world"),
        (Finish(FinishReason.EOS, EOS), (), OutputFinish(FinishKind.EOS, 5, token_id=EOS), "world"),
        (Finish(FinishReason.STOP_TOKEN, 71), (), OutputFinish(FinishKind.STOP_TOKEN, 5, token_id=71), "world"),
        (Finish(FinishReason.LENGTH), ("x", "rl"), OutputFinish(FinishKind.STOP_STRING, 4, stop_string="rl"), "wo"),
        (Finish(FinishReason.LENGTH), ("dx",), OutputFinish(FinishKind.LENGTH, 5), "world"),
    ],
)
async def test_an_output_ends_by_length_token_or_stop_string(
    finish: Finish, stop_strings: tuple[str, ...], expected: OutputFinish, text: str
) -> None:
    request = replace(REQUEST, stopping=StoppingOptions(stop_strings=stop_strings))
    deltas = await run_alone(request, writes("world", finish))
    assert deltas[-1].new.finish == expected
    assert text_of(deltas) == text


async def test_a_stop_string_ends_the_attempt_even_if_no_text_is_requested() -> None:
    request = replace(
        REQUEST,
        output=OutputOptions(text=False),
        stopping=StoppingOptions(stop_strings=["or"], include_stop_strings=True),
    )
    async with pipeline_parts(writes("world")) as parts:
        deltas = await run(parts, request)
    assert deltas[-1].new.finish == OutputFinish(FinishKind.STOP_STRING, 3, stop_string="or")
    assert parts.attempts.num_running == parts.admission.num_unreturned == 0


async def test_without_text_and_stop_strings_nothing_is_detokenized() -> None:
    deltas = await run_alone(replace(REQUEST, output=OutputOptions(text=False)), writes("world"))
    assert text_of(deltas) == "" and sum(len(delta.new.token_ids) for delta in deltas) == 5


async def test_special_tokens_are_text_only_if_requested() -> None:
    def script(request: EngineRequest) -> Iterable[Step]:
        return [Prefilled(0), Tokens(0, (1,)), END]

    assert text_of(await run_alone(REQUEST, script)) == ""
    shown = replace(REQUEST, output=OutputOptions(skip_special_tokens=False))
    assert text_of(await run_alone(shown, script)) == "<|start|>"


LOGPROBS = (TokenLogprobs(Candidate(41, -0.5, 1), (Candidate(41, -0.5, 1),)),)


async def test_the_first_delta_reports_the_prompt_and_no_other_does() -> None:
    request = replace(REQUEST, sampling=Sampling(prompt_logprobs=1))
    deltas = await run_alone(request, writes("wo", prefilled=Prefilled(4, LOGPROBS)))
    report = deltas[0].prompt
    assert report is not None
    assert (report.num_cached_tokens, report.logprobs, report.predicted_output_tokens) == (4, LOGPROBS, 20)
    assert [delta.prompt for delta in deltas[1:]] == [None] * 2


async def test_timings_come_with_the_last_delta() -> None:
    clock = ManualClock(100.0)

    def script(request: EngineRequest) -> Iterable[Step]:
        return [
            lambda: clock.advance(3.0),
            Prefilled(0, waited_s=2.5),
            lambda: clock.advance(0.25),
            Tokens(0, (40,)),
            lambda: clock.advance(4.0),
            END,
        ]

    async with pipeline_parts(script, clock=clock) as parts:
        parts.admission.open.clear()
        running = asyncio.create_task(run(parts, REQUEST, arrived_at_s=99.0))
        await until(lambda: parts.admission.num_queued("m") == 1)
        clock.advance(7.0)
        parts.admission.open.set()
        deltas = await running
    assert [delta.timings for delta in deltas[:-1]] == [None]
    timings = deltas[-1].timings
    assert timings is not None
    assert (timings.queue_s, timings.ttft_s, timings.e2e_s) == (8.0, 11.25, 15.25)
    assert timings.router_s == 11.25 - 7.0 - 2.5, "the waits for the credit and for prefill are not the router's own"


async def test_the_scheduling_report_comes_only_if_requested() -> None:
    assert (await run_alone(REQUEST, writes("x")))[0].scheduling is None
    (first, *later) = await run_alone(replace(REQUEST, output=OutputOptions(scheduling=True)), writes("xy"))
    report = first.scheduling
    assert report is not None and not any(delta.scheduling for delta in later)
    assert (report.policy, report.source, report.decision, report.num_overtaken) == ("fcfs", "cold", 1, 3)
    assert report.reason == "fcfs, priority 0: waited 0 s"
    assert first.prompt is not None and first.prompt.predicted_output_tokens == 20, "limited by max_new_tokens"
    assert report.p50_output_tokens == COLD_TOKENS, "every cold request has the work of this length"
    assert report.decode_s == UNMEASURED.decode.decode_s(COLD_TOKENS - 1, 0)


async def test_what_became_of_a_request_is_in_its_last_delta_only_if_requested() -> None:
    report = Execution({PreemptionReason.ORDER: 1}, 2, 0, 3.0, 4.0)

    def script(request: EngineRequest) -> Iterable[Step]:
        *steps, finish = writes("xy")(request)
        return [*steps, Reported(report, is_final=True), finish]

    assert [delta.execution for delta in await run_alone(REQUEST, script)] == [None] * 3
    deltas = await run_alone(replace(REQUEST, output=OutputOptions(scheduling=True), num_sequences=2), script)
    assert deltas[-1].execution == report.plus(report), "of both sequences"
    assert all(delta.execution is None for delta in deltas[:-1])


@pytest.mark.parametrize(("arrived_at_s", "is_overdue"), [(40.0, True), (60.0, False)])
async def test_a_request_whose_credit_came_after_the_longest_wait_was_overdue(
    arrived_at_s: float, is_overdue: bool
) -> None:
    """It gets its credit at 100 s."""
    request, record = replace(REQUEST, output=OutputOptions(scheduling=True)), RequestRecord("r", arrived_at_s)
    async with pipeline_parts(writes("x"), policy=replace(FCFS, max_wait_s=50.0)) as parts:
        deltas = [delta async for delta in await parts.pipeline.start(request, record)]
        assert parts.metrics.of("m").num_predictions["cold"] == 1
    assert deltas[-1].execution is not None and deltas[-1].execution.is_overdue is is_overdue
    assert (record.source, record.predicted_tokens) == ("cold", COLD_TOKENS)


async def test_the_scheduling_report_has_the_work_by_which_the_unit_ordered_the_request() -> None:
    stopping = StoppingOptions(max_new_tokens=9, ignore_eos=True)
    request = replace(REQUEST, stopping=stopping, output=OutputOptions(scheduling=True))
    async with pipeline_parts(writes("x")) as parts:
        (first, *_) = await run(parts, request)
    report, scheduling = first.scheduling, parts.attempts.requests[0].scheduling
    assert report is not None
    assert report.prefill_s == scheduling.prefill_s == UNMEASURED.prefill.prefill_s(5, chunk=128) / 2, "half is cached"
    assert report.decode_s == scheduling.decode_s == UNMEASURED.decode.decode_s(8, 5)


@pytest.mark.parametrize(
    ("stopping", "source"),
    [
        (StoppingOptions(max_new_tokens=9, ignore_eos=True), "fixed"),
        (StoppingOptions(max_new_tokens=9, min_new_tokens=9), "fixed"),
        (StoppingOptions(max_new_tokens=9, ignore_eos=True, stop_strings=["x"]), "cold"),
    ],
)
async def test_a_length_that_the_request_fixes_is_not_predicted(stopping: StoppingOptions, source: str) -> None:
    request = replace(REQUEST, stopping=stopping, output=OutputOptions(scheduling=True))
    (first, *_) = await run_alone(request, writes("abc"))
    assert first.scheduling is not None and first.prompt is not None
    assert (first.scheduling.source, first.prompt.predicted_output_tokens) == (source, 9 if source == "cold" else None)
    assert first.scheduling.p50_output_tokens == (COLD_TOKENS if source == "cold" else 9)
    assert (first.prompt.predicted_output_tokens is None) == (source == "fixed")


class RecordingPredictor(LengthPredictor):
    """Records the texts that it reads and the lengths that it observes."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.observed: list[tuple[int, bool]] = []

    def predict(self, text: str, model: str, tenant: str = "") -> Any:
        self.texts.append(text)
        return super().predict(text, model, tenant)

    def observe(self, guess: Any, model: str, num_tokens: int, censored: bool) -> None:
        self.observed.append((num_tokens, censored))
        super().observe(guess, model, num_tokens, censored)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (TextPrompt("hello"), "hello"),
        (CHAT, "Hi"),
        (ChatPrompt((ChatMessage("system", "Be brief."),)), ""),
        (TokensPrompt(tokens_of("hello")), "hello"),
    ],
)
async def test_the_predictor_reads_the_prompt_or_the_last_user_message(prompt: Prompt, text: str) -> None:
    predictor = RecordingPredictor()
    await run_alone(replace(REQUEST, prompt=prompt), writes("x"), predictor=predictor)
    assert predictor.texts == [text]


@pytest.mark.parametrize(
    ("finish", "censored"), [(Finish(FinishReason.EOS, EOS), False), (Finish(FinishReason.LENGTH), True)]
)
async def test_the_predictor_observes_the_length_of_every_output(finish: Finish, censored: bool) -> None:
    predictor = RecordingPredictor()
    async with pipeline_parts(writes("abc", finish), predictor=predictor) as parts:
        await run(parts, replace(REQUEST, num_sequences=2))
        await parts.forecaster.call(lambda: None)
    assert predictor.observed == [(3, censored)] * 2


async def test_an_aborted_output_is_observed_as_cut_off() -> None:
    predictor = RecordingPredictor()
    async with pipeline_parts(writes("abc", Finish(FinishReason.EOS, EOS)), predictor=predictor) as parts:
        async with aclosing(await parts.pipeline.start(REQUEST, RequestRecord("r", 100.0))) as deltas:
            await anext(deltas)
            await anext(deltas)
        await parts.forecaster.call(lambda: None)
    assert predictor.observed == [(2, True)]


async def test_lengths_are_learned_in_the_order_in_which_the_outputs_started() -> None:
    predictor, goes_on = RecordingPredictor(), asyncio.Event()

    def script(request: EngineRequest) -> Iterable[Any]:
        if request.prompt_token_ids == tokens_of("short"):
            return writes("x", Finish(FinishReason.EOS, EOS))(request)
        *tokens, end = writes("long", Finish(FinishReason.EOS, EOS))(request)
        return [*tokens, goes_on, end]

    async with pipeline_parts(script, predictor=predictor) as parts:
        long = asyncio.create_task(run(parts, REQUEST))
        await until(lambda: parts.pipeline.counters["m"].output_tokens == 4)
        await run(parts, replace(REQUEST, prompt=TokensPrompt(tokens_of("short"))))
        await parts.forecaster.call(lambda: None)
        assert predictor.observed == []
        goes_on.set()
        await long
        await parts.forecaster.call(lambda: None)
    assert predictor.observed == [(4, False), (1, False)]


async def test_several_sequences_share_prompt_and_seed_and_differ_by_their_index() -> None:
    request = replace(REQUEST, num_sequences=3, sampling=Sampling(prompt_logprobs=2), bypass_prefix_cache=True)
    async with pipeline_parts(lambda engine: writes("abc"[engine.sequence_index] * 2)(engine)) as parts:
        deltas = await run(parts, request)
    assert [text_of(deltas, index) for index in range(3)] == ["aa", "bb", "cc"]
    assert sum(delta.new.finish is not None for delta in deltas) == 3
    first, *others = parts.attempts.requests
    assert [one.sequence_index for one in others] == [1, 2]
    assert {one.sampling.seed for one in parts.attempts.requests} == {3}
    assert (first.sampling.prompt_logprobs, first.bypass_prefix_cache) == (2, True)
    assert {(one.sampling.prompt_logprobs, one.bypass_prefix_cache) for one in others} == {(None, False)}
    assert [delta.prompt is not None for delta in deltas] == [True] + [False] * (len(deltas) - 1)
    assert [delta.timings is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]


async def test_further_sequences_wait_until_the_first_one_has_computed_the_prompt() -> None:
    prompt_is_computed = asyncio.Event()

    def script(request: EngineRequest) -> Iterable[Step]:
        if request.sequence_index == 0:
            yield prompt_is_computed
        yield from writes("x")(request)

    async with pipeline_parts(script) as parts:
        running = asyncio.create_task(run(parts, replace(REQUEST, num_sequences=3)))
        await until(lambda: parts.pipeline.counters["m"].num_held_back == 2)
        assert (parts.pipeline.num_waiting("m"), len(parts.attempts.requests)) == (2, 1)
        assert parts.pipeline.counters["m"].num_running == 3
        prompt_is_computed.set()
        await running
        assert parts.pipeline.num_waiting("m") == 0


async def test_counters_count_sequences_requests_and_tokens() -> None:
    async with pipeline_parts(writes("abc")) as parts:
        await run(parts, replace(REQUEST, num_sequences=2))
        await run(parts, REQUEST)
    assert parts.pipeline.counters["m"] == ModelCounters(num_finished=2, prompt_tokens=10, output_tokens=9)


def fails_once_after(text: str, whole: str, error: Exception) -> Script:
    def script(request: EngineRequest) -> Iterable[Any]:
        *steps, end = writes(whole if request.resume_token_ids else text)(request)
        return [*steps, end if request.resume_token_ids else error]

    return script


async def test_a_lost_worker_costs_no_token_and_repeats_none() -> None:
    async with pipeline_parts(fails_once_after("wor", "world", WorkerLost("gone"))) as parts:
        deltas = await run(parts, REQUEST)
    assert text_of(deltas) == "world"
    assert [one.resume_token_ids for one in parts.attempts.requests] == [(), tokens_of("wor")]
    assert deltas[-1].timings is not None and deltas[-1].timings.num_restarts == 1
    assert parts.pipeline.counters["m"].num_restarts == 1
    assert parts.admission.num_unreturned == 0


def fails(error: Exception, index: int = 0) -> Script:
    def script(request: EngineRequest) -> Iterable[Any]:
        if request.sequence_index == index:
            raise error
        yield from writes("abc")(request)
        yield asyncio.Event()

    return script


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (WorkerLost("gone"), WorkerLost, "^gone$"),
        (EngineFailed("nan"), InternalError, "^the request failed repeatedly: nan$"),
        (InvalidRequest("text", "too long for the pool"), InvalidRequest, "^text: too long for the pool$"),
    ],
)
@pytest.mark.parametrize("failing_index", [0, 1])
async def test_the_last_error_of_any_sequence_ends_the_request(
    error: Exception, raised: type[Exception], message: str, failing_index: int
) -> None:
    async with pipeline_parts(fails(error, failing_index)) as parts:
        with pytest.raises(raised, match=message):
            await run(parts, replace(REQUEST, num_sequences=3))
    counters = parts.pipeline.counters["m"]
    assert (counters.num_aborted, counters.num_finished, counters.num_running, counters.num_held_back) == (1, 0, 0, 0)
    assert parts.attempts.num_running == parts.admission.num_unreturned == 0


@pytest.mark.parametrize("num_sequences", [1, 3])
async def test_closing_a_request_ends_every_attempt_and_returns_every_credit(num_sequences: int) -> None:
    def script(request: EngineRequest) -> Iterable[Step]:
        return [Prefilled(0), Tokens(0, (40,)), asyncio.Event()]

    async with pipeline_parts(script) as parts:
        request = replace(REQUEST, num_sequences=num_sequences)
        async with aclosing(await parts.pipeline.start(request, RequestRecord("r", 100.0))) as deltas:
            for _ in range(num_sequences):
                await anext(deltas)
            assert parts.attempts.num_running == parts.admission.num_unreturned == num_sequences
        assert parts.attempts.num_running == parts.admission.num_unreturned == 0
    counters = parts.pipeline.counters["m"]
    assert (counters.num_aborted, counters.num_running) == (1, 0)


async def test_a_request_that_is_cancelled_in_the_queue_leaves_it() -> None:
    async with pipeline_parts(writes("x")) as parts:
        parts.admission.open.clear()
        running = asyncio.create_task(run(parts, replace(REQUEST, num_sequences=2)))
        await until(lambda: parts.pipeline.num_waiting("m") == 2)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert parts.pipeline.num_waiting("m") == 0
    assert parts.admission.num_issued == 0


async def test_an_unknown_model_is_not_found() -> None:
    async with pipeline_parts(writes("x"), served_model("a"), served_model("b")) as parts:
        with pytest.raises(ModelNotFound, match="model: 'm' is not served; served: a, b"):
            parts.pipeline.validate(REQUEST)


async def test_a_text_that_tokenizes_to_more_than_the_context_is_refused_before_it_waits() -> None:
    async with pipeline_parts(writes("x")) as parts:
        with pytest.raises(InvalidRequest, match="text: is 100 tokens; the context holds 100"):
            await run(parts, replace(REQUEST, prompt=TextPrompt("x" * 100)))
    assert parts.admission.num_issued == 0 and parts.pipeline.counters["m"] == ModelCounters()


async def test_a_prompt_of_too_many_bytes_is_refused_by_the_configured_limit() -> None:
    config = RouterConfig.model_validate({"max_prompt_bytes": 4})
    async with pipeline_parts(writes("x"), config=config) as parts:
        with pytest.raises(InvalidRequest, match="text: is 5 bytes; at most 4"):
            parts.pipeline.validate(REQUEST)


async def test_requests_beyond_the_queue_s_limit_are_refused_over_all_models() -> None:
    config = RouterConfig(max_waiting_requests=2, predictor_budget_s=60)
    async with pipeline_parts(writes("x"), served_model("a"), served_model("b"), config=config) as parts:
        parts.admission.open.clear()
        waiting = asyncio.create_task(run(parts, replace(REQUEST, model="a", num_sequences=2)))
        await until(lambda: parts.pipeline.num_waiting("a") == 2)
        with pytest.raises(Overloaded, match="2 sequences are waiting and 1 would be added; at most 2 may wait"):
            await run(parts, replace(REQUEST, model="b"))
        parts.admission.open.set()
        await waiting
        assert await run(parts, replace(REQUEST, model="b"))


async def test_workers_get_the_targets_of_a_request_and_its_record_what_it_is_judged_by() -> None:
    record, slo = RequestRecord("r", 100.0), SloConfig(scale=4)
    async with pipeline_parts(writes("x"), served_model(slo=slo)) as parts:
        parts.admission.unloaded["m"].observe(ModelCosts(StepCost(0.1, 0.01, 0.0), StepCost(0.2, 0.0, 0.001, 9.0)))
        async with aclosing(await parts.pipeline.start(REQUEST, record)) as deltas:
            *_, last = [delta async for delta in deltas]
    assert last.timings is not None and last.timings.met_slo is True
    (request,) = parts.attempts.requests
    num_prompt = len(request.prompt_token_ids)
    assert request.slo is not None and record.slo is not None
    assert request.slo.ttft_s == pytest.approx(4 * (0.1 + num_prompt * 0.01))
    assert request.slo.tpot_s == pytest.approx(4 * (0.2 + num_prompt * 0.001))
    assert record.slo.targets(num_prompt) == request.slo


async def test_a_request_has_no_slo_before_its_unloaded_latency_is_known() -> None:
    record = RequestRecord("r", 100.0)
    async with (
        pipeline_parts(writes("x"), served_model(slo=SloConfig(scale=4))) as parts,
        aclosing(await parts.pipeline.start(REQUEST, record)) as deltas,
    ):
        await anext(deltas)
    assert record.slo is None and parts.attempts.requests[0].slo is None


async def test_a_request_that_is_refused_has_an_slo_that_it_missed() -> None:
    record, config = RequestRecord("r", 100.0, "m"), RouterConfig(max_waiting_requests=1, predictor_budget_s=60)
    async with pipeline_parts(writes("x"), served_model(slo=SloConfig(tpot_s=1)), config=config) as parts:
        request = replace(REQUEST, num_sequences=2)
        with pytest.raises(Overloaded):
            await parts.pipeline.start(request, record)
    assert record.slo == RequestSlo(SloConfig(tpot_s=1))


async def test_requests_that_arrive_together_do_not_exceed_the_queue_s_limit() -> None:
    config = RouterConfig(max_waiting_requests=3, predictor_budget_s=60)
    async with pipeline_parts(writes("x"), config=config) as parts:
        parts.admission.open.clear()
        running = [asyncio.create_task(run(parts, REQUEST)) for _ in range(10)]
        await until(lambda: sum(task.done() for task in running) == 7)
        parts.admission.open.set()
        outcomes = await asyncio.gather(*running, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes].count(Overloaded) == 7


async def test_a_hint_and_the_tenant_reach_the_predictor_s_checks() -> None:
    """After enough hints of a tenant that came true, its hint is the prediction."""
    script = writes("a" * 15, Finish(FinishReason.EOS, EOS))
    async with pipeline_parts(script) as parts:
        for number in range(10):
            prompt = TextPrompt(f"prompt {number}")
            deltas = await run(
                parts,
                replace(
                    REQUEST,
                    prompt=prompt,
                    cache_salt="t",
                    expected_output_tokens=15,
                    output=OutputOptions(scheduling=True),
                ),
            )
            await parts.forecaster.call(lambda: None)
    assert deltas[0].scheduling is not None and deltas[0].scheduling.source == "hint"


class BlockedText(TextModel):
    """The byte tokenizer, which tokenizes only while ``may_encode`` is set."""

    def __init__(self) -> None:
        super().__init__(byte_tokenizer())
        self.may_encode = threading.Event()

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert self.may_encode.wait(20)
        return super().encode(text, add_special_tokens)


async def test_a_sequence_whose_prompt_is_tokenized_counts_as_waiting() -> None:
    text, config = BlockedText(), RouterConfig(max_waiting_requests=2, predictor_budget_s=60)
    async with pipeline_parts(writes("hello"), served_model(text=text), config=config) as parts:
        running = asyncio.create_task(run(parts, replace(REQUEST, num_sequences=2)))
        await until(lambda: parts.pipeline.num_waiting("m") == 2)
        assert parts.pipeline.counters["m"].num_running == 2
        with pytest.raises(Overloaded, match="2 sequences are waiting and 1 would be added; at most 2 may wait"):
            await run(parts, REQUEST)
        text.may_encode.set()
        await running
        assert parts.pipeline.num_waiting("m") == parts.pipeline.counters["m"].num_running == 0


async def test_a_request_that_is_cancelled_while_its_prompt_waits_waits_no_longer() -> None:
    text = BlockedText()
    async with pipeline_parts(writes("hello"), served_model(text=text)) as parts:
        running = asyncio.create_task(run(parts, REQUEST))
        await until(lambda: parts.pipeline.num_waiting("m") == 1)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert parts.pipeline.num_waiting("m") == parts.pipeline.counters["m"].num_running == 0
        text.may_encode.set()
