"""The driver over several attempts, each of which does what a line of a script says."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest

from muxmesh.clock import ManualClock
from muxmesh.engine.api import Finished, Tokens
from muxmesh.errors import (
    EngineFailed,
    InternalError,
    InvalidRequest,
    LeaseLost,
    MeshError,
    ModelNotFound,
    RequestPreempted,
    SequenceFailed,
    WorkerLost,
)
from muxmesh.execution import NO_EXECUTION, Execution, PreemptionReason
from muxmesh.types import (
    EngineRequest,
    Finish,
    FinishReason,
    LeaseRef,
    LengthPrediction,
    Sampling,
    SchedulingState,
    SloTargets,
    Stopping,
    Waits,
)
from router.admission_client import Credit
from router.attempt import AttemptEvent, Prefilled, Reported
from router.credit_wait import CreditedAttempt
from router.generation import FinishKind, OutputFinish, SequenceDelta
from router.sequence_driver import Progress, SequenceDriver
from router.sequence_output import SequenceOutput
from router.units import ChosenUnit

REQUEST = EngineRequest("r", "m", (40, 41), Sampling(prompt_logprobs=0), Stopping(6), SchedulingState(0, 0.0, 2.0, 6.0),
                        prediction=LengthPrediction(6, 6))  # fmt: skip
END = Finished(Finish(FinishReason.LENGTH))
DISCOUNTED = SchedulingState(0, 0.0, 0.5, 6.0)
Script = list[list[int | float | MeshError | Finished | Prefilled | Reported]]


CHOSEN = cast(ChosenUnit, "the unit that is chosen when a request is queued")


@dataclass(frozen=True)
class FakeAttempt:
    """Stands for `CreditedAttempt`."""

    credit: Credit
    chosen: object
    cached: list[int]

    def prefilled(self, num_cached_tokens: int) -> None:
        self.cached.append(num_cached_tokens)


@dataclass
class FakeUnit:
    """Stands for `CreditWait`: issues every credit at once, and counts those that are not returned."""

    num_unreturned: int = 0
    queued: list[EngineRequest] = field(default_factory=list)
    firsts: list[ChosenUnit | None] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)

    @asynccontextmanager
    async def credited(self, request: EngineRequest, first: ChosenUnit | None) -> AsyncIterator[CreditedAttempt]:
        self.queued.append(request)
        self.firsts.append(first)
        self.num_unreturned += 1
        credit = Credit(LeaseRef(self.num_unreturned, 1), "p", "", "d", "", 1, 0, DISCOUNTED, Waits(slot_s=1.0))
        try:
            yield cast(CreditedAttempt, FakeAttempt(credit, f"unit {len(self.queued)}", self.cached))
        finally:
            self.num_unreturned -= 1


@dataclass
class Outcome:
    deltas: list[SequenceDelta]
    output: SequenceOutput
    progress: Progress
    unit: FakeUnit
    requests: list[EngineRequest]
    waits_s: list[float]

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]


async def run(script: Script, max_restarts: int = 2, wait_s: float = 0.0, request: EngineRequest = REQUEST) -> Outcome:
    """Runs the driver; each attempt follows a line of ``script``, in which a float is seconds that pass.

    Records the waits between attempts, each of which takes ``wait_s`` by the driver's clock.
    """
    attempts, requests, waits_s, unit = iter(script), list[EngineRequest](), list[float](), FakeUnit()
    clock = ManualClock(5.0)

    async def attempt(request: EngineRequest, credit: Credit) -> AsyncGenerator[AttemptEvent, None]:
        requests.append(request)
        assert unit.num_unreturned == 1, "an attempt has a credit"
        index = len(request.resume_token_ids)
        for act in next(attempts):
            if isinstance(act, int):
                yield Tokens(index, (act,))
                index += 1
            elif isinstance(act, float):
                clock.advance(act)
            elif isinstance(act, MeshError):
                raise act
            else:
                yield act

    async def record_wait(seconds: float) -> None:
        waits_s.append(seconds)
        clock.advance(wait_s)

    progress, output = Progress(), SequenceOutput(REQUEST.stopping)
    driver = SequenceDriver(unit.credited, attempt, clock, max_restarts, record_wait)
    try:
        deltas = [delta async for delta in driver.run(request, output, progress, CHOSEN)]
    finally:
        assert unit.num_unreturned == 0, "a credit was not returned"
    assert progress.credited_at_s == 5.0
    return Outcome(deltas, output, progress, unit, requests, waits_s)


async def test_a_lost_worker_costs_no_token_and_repeats_none() -> None:
    outcome = await run([[7, 8, WorkerLost("gone")], [LeaseLost("late")], [9, 10, 11, 12, END]])
    assert outcome.tokens == outcome.output.token_ids == [7, 8, 9, 10, 11, 12]
    assert outcome.deltas[-1].finish == OutputFinish(FinishKind.LENGTH, 6)
    assert outcome.progress.num_restarts == 2


async def test_an_attempt_continues_after_the_tokens_that_the_client_has() -> None:
    outcome = await run([[7, 8, WorkerLost("gone")], [9, 10, 11, 12, END]])
    first, second = outcome.requests
    assert (first.resume_token_ids, second.resume_token_ids) == ((), (7, 8))
    assert (first.sampling.prompt_logprobs, second.sampling.prompt_logprobs) == (0, None), "the client has them"
    before, after = (request.scheduling for request in outcome.unit.queued)
    assert (before.decode_s, after.decode_s, after.prefill_s) == (6.0, 4.0, 2.0), (
        "less output remains, and the whole prompt"
    )
    assert [request.resume_token_ids for request in outcome.unit.queued] == [(), (7, 8)]


async def test_workers_order_a_request_by_the_same_state_as_the_unit() -> None:
    outcome = await run([[7, 8, 9, 10, 11, 12, END]])
    assert outcome.requests[0].scheduling == DISCOUNTED
    assert outcome.progress.credit is not None and outcome.progress.credit.scheduling == DISCOUNTED


async def test_workers_learn_how_long_a_request_with_an_slo_has_waited_by_the_router_s_clock() -> None:
    """The arrival by which the unit has ordered it is on the unit's clock."""
    request = replace(REQUEST, scheduling=SchedulingState(0, 3.0), slo=SloTargets(5.0, 0.1))
    outcome = await run([[7, 4.0, WorkerLost("gone")], [8, 9, 10, 11, 12, END]], request=request)
    assert [one.slo for one in outcome.requests] == [SloTargets(5.0, 0.1, 2.0), SloTargets(5.0, 0.1, 6.0)]


async def test_a_complete_output_whose_finish_was_lost_is_not_computed_again() -> None:
    outcome = await run([[1, 2, 3, 4, 5, 6, WorkerLost("gone")]])
    assert outcome.deltas[-1].finish == OutputFinish(FinishKind.LENGTH, 6)
    assert len(outcome.tokens) == 6
    assert (outcome.progress.num_restarts, len(outcome.requests)) == (0, 1)


async def test_a_complete_output_is_returned_even_if_no_restart_is_left() -> None:
    outcome = await run([[1, 2, 3, 4, 5, WorkerLost("gone")], [6, WorkerLost("gone")]], max_restarts=0)
    assert outcome.deltas[-1].finish == OutputFinish(FinishKind.LENGTH, 6)


async def test_a_request_fails_after_too_many_attempts_without_a_token() -> None:
    with pytest.raises(WorkerLost, match="third"):
        await run([[WorkerLost("first")], [WorkerLost("second")], [WorkerLost("third")]])


async def test_a_request_fails_after_too_many_attempts_with_one_token_each() -> None:
    with pytest.raises(InternalError, match="failed repeatedly: nan"):
        await run([[7, EngineFailed("nan")], [8, EngineFailed("nan")], [9, EngineFailed("nan")]])


@pytest.mark.parametrize("kind", [EngineFailed, InternalError])
async def test_an_error_that_a_second_attempt_meets_at_the_same_token_is_not_retried_again(
    kind: type[MeshError],
) -> None:
    with pytest.raises(InternalError, match="failed repeatedly: step: ValueError"):
        await run([[7, 8, 9, kind("step: ValueError")], [kind("step: ValueError")]], max_restarts=5)


async def test_the_same_error_at_another_token_or_of_a_lost_worker_is_retried() -> None:
    script: Script = [[7, EngineFailed("x")], [8, EngineFailed("x")], [WorkerLost("y")], [WorkerLost("y")]]
    outcome = await run([*script, [9, 10, 11, 12, END]], max_restarts=5)
    assert outcome.progress.num_restarts == 4


async def test_a_sequence_that_no_engine_can_compute_is_not_retried() -> None:
    with pytest.raises(SequenceFailed, match="not finite"):
        await run([[7, 8, SequenceFailed("logits that are not finite")]])


async def test_waits_are_added_over_the_attempts_until_the_first_token() -> None:
    outcome = await run(
        [
            [WorkerLost("gone")],
            [Prefilled(3, device_wait_s=0.5), 7, 8, WorkerLost("gone")],
            [Prefilled(9, device_wait_s=4.0), 9, 10, 11, 12, END],
        ]
    )
    assert outcome.progress.waits == Waits(slot_s=2.0, device_s=0.5)


async def test_an_attempt_with_two_tokens_resets_the_count_of_failures() -> None:
    script: Script = [[WorkerLost("")], [WorkerLost("")], [1, 2, WorkerLost("")], [WorkerLost("")], [3, 4, 5, 6, END]]
    assert (await run(script)).progress.num_restarts == 4


async def test_what_became_of_a_sequence_is_added_over_its_attempts() -> None:
    order, full = PreemptionReason.ORDER, PreemptionReason.KV_FULL
    first = Execution({order: 1, full: 1}, 2, 1, 10.0, 3.0, 0.0)
    outcome = await run(
        [
            [Prefilled(0), 1, 2, Reported(first, is_final=True), RequestPreempted("pool full")],
            [WorkerLost("gone")],
            [Prefilled(0), 3, 4, 5, 6, Reported(Execution({order: 1}, 1, 0, 5.0, 0.0, 2.0), is_final=True), END],
        ],
        wait_s=8.0,
    )
    total = Execution({order: 2, full: 1}, 3, 1, 15.0, 3.0, 2.0, recomputed_s=16.0)
    assert outcome.progress.ended == total, "it was computed again after two waits"


async def test_an_attempt_that_failed_before_its_first_token_computes_nothing_again() -> None:
    outcome = await run([[WorkerLost("gone")], [Prefilled(0), 1, 2, 3, 4, 5, 6, END]], wait_s=8.0)
    assert outcome.progress.ended == NO_EXECUTION


async def test_of_an_attempt_without_a_final_report_the_time_since_the_latest_one_counts_as_in_the_batch() -> None:
    report = Execution({PreemptionReason.ORDER: 1}, 1, 0, 2.0, 3.0, 4.0)
    outcome = await run(
        [
            [Prefilled(0), 1, 9.0, Reported(report), 2, 16.0, WorkerLost("gone")],
            [Prefilled(0), 3, 0.5, 4, 5, 6, END],
        ],
        wait_s=8.0,
    )
    total = Execution({PreemptionReason.ORDER: 1}, 1, 0, 9.0 + 16.0 - 3.0 - 4.0 + 0.5, 3.0, 4.0, recomputed_s=8.0)
    assert outcome.progress.ended == total


async def test_an_output_that_a_stop_string_ends_is_reported_with_its_last_delta() -> None:
    """The attempt is closed before its worker has reported the end."""
    progress, clock = Progress(), ManualClock(5.0)
    output = SequenceOutput(REQUEST.stopping)

    async def attempt(request: EngineRequest, credit: Credit) -> AsyncGenerator[AttemptEvent, None]:
        yield Prefilled(0)
        yield Reported(Execution({PreemptionReason.SLO: 2}, paused_s=1.0))
        clock.advance(4.0)
        output.finish = OutputFinish(FinishKind.STOP_STRING, 1, stop_string="x")
        yield Tokens(0, (1,))

    driver = SequenceDriver(FakeUnit().credited, attempt, clock, 0)
    deltas = driver.run(REQUEST, output, progress)
    await anext(deltas)
    expected = Execution({PreemptionReason.SLO: 2}, batched_s=3.0, paused_s=1.0)
    assert progress.execution(clock.monotonic_s()) == expected
    assert [delta async for delta in deltas] == [] and progress.ended == expected


async def test_preemption_is_no_failure() -> None:
    preempted: Script = [[RequestPreempted("pool full")] for _ in range(5)]
    script: Script = [*preempted, [1, 2, 3, 4, 5, 6, END]]
    assert (await run(script, max_restarts=0)).progress.num_restarts == 5


async def test_the_count_of_pre_emptions_travels_with_the_request() -> None:
    def displaced(number: int) -> Reported:
        return Reported(Execution({PreemptionReason.ORDER: number, PreemptionReason.KV_FULL: 1}))

    script: Script = [
        [Prefilled(0), 1, displaced(2), RequestPreempted("pool full")],
        [Prefilled(0), 2, WorkerLost("gone")],
        [Prefilled(0), 3, displaced(1), WorkerLost("gone")],
        [Prefilled(0), 4, 5, 6, END],
    ]
    queued = (await run(script)).unit.queued
    assert [request.scheduling.num_preemptions for request in queued] == [0, 2, 2, 3], "only those from the batch"


@pytest.mark.parametrize("error", [InvalidRequest("stopping.max_new_tokens", "too many"), ModelNotFound("gone")])
async def test_an_error_of_the_request_itself_is_not_retried(error: MeshError) -> None:
    with pytest.raises(type(error)):
        await run([[error]])


async def test_the_wait_before_an_attempt_doubles_with_each_failure_in_a_row_up_to_a_bound() -> None:
    failures: Script = [[WorkerLost("")] for _ in range(8)]
    outcome = await run([*failures, [1, 2, WorkerLost("")], [3, 4, 5, 6, END]], max_restarts=8)
    assert outcome.waits_s == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0, 0.05]


async def test_each_attempt_chooses_a_unit_anew_and_the_first_one_is_reported() -> None:
    outcome = await run([[1, 2, WorkerLost("gone")], [3, 4, 5, 6, END]])
    assert outcome.unit.firsts == [CHOSEN, None], "the choice before the request was queued is for one attempt"
    assert outcome.progress.credit is not None and outcome.progress.credit.lease == LeaseRef(1, 1)
    assert cast(Any, outcome.progress.chosen) == "unit 1"


async def test_what_each_prefill_found_in_the_prefix_cache_is_noted() -> None:
    outcome = await run([[Prefilled(3), 1, 2, WorkerLost("gone")], [Prefilled(5), 3, 4, 5, 6, END]])
    assert outcome.unit.cached == [3, 5]


def test_the_queue_time_of_a_sequence_without_a_credit_is_zero() -> None:
    assert Progress().queued_s(5.0) == 0.0
    assert Progress(credited_at_s=7.5).queued_s(5.0) == 2.5


async def test_only_waits_before_the_first_token_are_measured() -> None:
    outcome = await run(
        [[Prefilled(3, waited_s=1.5), 7, 8, WorkerLost("gone")], [Prefilled(9, waited_s=4.0), 9, 10, 11, 12, END]]
    )
    assert outcome.progress.waited_s == 1.5
    assert outcome.progress.prefilled == Prefilled(9, waited_s=4.0)


async def test_closing_a_sequence_closes_its_attempt_and_returns_its_credit() -> None:
    unit = FakeUnit()
    closed: list[str] = []

    async def attempt(request: EngineRequest, credit: Credit) -> AsyncGenerator[AttemptEvent, None]:
        try:
            yield Tokens(0, (1,))
            yield Tokens(1, (2,))
        finally:
            closed.append("attempt")

    driver = SequenceDriver(unit.credited, attempt, ManualClock(), 0)
    deltas = driver.run(REQUEST, SequenceOutput(REQUEST.stopping), Progress())
    await anext(deltas)
    await deltas.aclose()
    assert closed == ["attempt"] and unit.num_unreturned == 0
