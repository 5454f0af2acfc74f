"""The reports of a request, from its progress."""

from dataclasses import replace

import pytest

from muxmesh.predictor.checked_predictor import CheckedPrediction
from muxmesh.scheduling_policy import FCFS
from muxmesh.slo import Verdict
from muxmesh.types import (
    Candidate,
    EngineRequest,
    LeaseRef,
    LengthPrediction,
    Sampling,
    SchedulingState,
    Stopping,
    TokenLogprobs,
    Waits,
)
from router.admission_client import Credit
from router.attempt import Prefilled
from router.generation_reports import prompt_report, scheduling_report, timings_report
from router.length_forecast import LengthForecast
from router.sequence_driver import Progress

PREDICTION = LengthPrediction(20.4, 50.0)
CHECKED = CheckedPrediction(PREDICTION, "cold", "m", "", None, None)
REQUEST = EngineRequest(
    "r", "m", (5, 6, 7), Sampling(seed=9), Stopping(64), SchedulingState(2, 1000.0, 0.5, 4.0), prediction=PREDICTION
)
CREDIT = Credit(LeaseRef(1, 1), "p", "unix:p", "d", "unix:d", 8, 3, SchedulingState(2, 1000.0, 0.25, 4.0))
FORECAST = LengthForecast(LengthPrediction(128.0, 300.0), "cold", CHECKED)


def progress(credited_at_s: float | None = None, waited_s: float = 0.0, num_restarts: int = 0) -> Progress:
    credit = None if credited_at_s is None else CREDIT
    return Progress(credited_at_s=credited_at_s, credit=credit, waited_s=waited_s, num_restarts=num_restarts)


def test_the_prompt_is_reported_as_it_was_computed() -> None:
    logprobs = (TokenLogprobs(Candidate(6, -0.5, 1), ()),)
    report = prompt_report(REQUEST, FORECAST, Progress(prefilled=Prefilled(2, logprobs)))
    assert (report.token_ids, report.seed) == ((5, 6, 7), 9)
    assert (report.num_cached_tokens, report.logprobs) == (2, logprobs)


def test_before_prefill_nothing_is_cached_or_scored() -> None:
    report = prompt_report(REQUEST, FORECAST, Progress())
    assert (report.num_cached_tokens, report.logprobs) == (0, ())


@pytest.mark.parametrize(("p50_tokens", "expected"), [(20.4, 20), (0.3, 1)])
def test_the_predicted_length_is_a_number_of_tokens(p50_tokens: float, expected: int) -> None:
    forecast = LengthForecast(LengthPrediction(p50_tokens, 50.0), "cold", CHECKED)
    assert prompt_report(REQUEST, forecast, Progress()).predicted_output_tokens == expected


def test_the_predicted_length_is_within_the_limits_of_the_request() -> None:
    assert prompt_report(REQUEST, FORECAST, Progress()).predicted_output_tokens == 64


def test_a_length_that_was_not_predicted_is_not_reported() -> None:
    fixed = LengthForecast(PREDICTION, "fixed")
    assert prompt_report(REQUEST, fixed, Progress()).predicted_output_tokens is None


def test_scheduling_is_reported_by_the_state_that_the_unit_ordered_the_request_by() -> None:
    report = scheduling_report(REQUEST, FORECAST, progress(credited_at_s=57.0), 50.0, FCFS)
    assert (report.prefill_s, report.decode_s) == (0.25, 4.0), "of the credit, not of the request"
    assert (report.decision, report.num_overtaken, report.waited_s) == (8, 3, 7.0)
    assert (report.policy, report.source) == ("fcfs", "cold")
    assert report.reason == FCFS.reason(CREDIT.scheduling, 1007.0)


def test_what_a_request_waited_for_is_reported() -> None:
    waits = Waits(slot_s=2.0, device_s=0.5)
    waited = replace(progress(57.0), waits=waits)
    assert scheduling_report(REQUEST, FORECAST, waited, 50.0, FCFS).waited_for == waits


def test_the_lengths_are_those_that_the_work_of_the_request_was_computed_from() -> None:
    limited = replace(REQUEST, prediction=LengthPrediction(64.0, 64.0))
    report = scheduling_report(limited, FORECAST, progress(57.0), 50.0, FCFS)
    assert (report.p50_output_tokens, report.p90_output_tokens) == (64.0, 64.0)
    unlimited = scheduling_report(replace(REQUEST, prediction=None), FORECAST, progress(57.0), 50.0, FCFS)
    assert (unlimited.p50_output_tokens, unlimited.p90_output_tokens) == (128.0, 300.0)


def test_without_a_credit_the_state_of_the_request_is_reported() -> None:
    report = scheduling_report(REQUEST, FORECAST, progress(), 50.0, FCFS)
    assert (report.prefill_s, report.decision, report.num_overtaken, report.waited_s) == (0.5, 0, 0, 0.0)


def test_times_count_from_the_arrival() -> None:
    sequences = [progress(52.0, waited_s=3.5, num_restarts=1), progress(60.0, waited_s=20.0, num_restarts=2)]
    report = timings_report(sequences, 50.0, 54.0, 70.0)
    assert (report.queue_s, report.ttft_s, report.e2e_s) == (2.0, 4.0, 20.0)
    assert report.router_s == 0.5, "the first token was waited for by the first sequence"
    assert report.num_restarts == 3


def test_the_routers_own_time_is_never_negative() -> None:
    assert timings_report([progress(52.0, waited_s=4.5)], 50.0, 54.0, 70.0).router_s == 0.0


@pytest.mark.parametrize("met", [True, False, None])
def test_a_request_says_whether_it_met_its_slo(met: bool | None) -> None:
    verdict = None if met is None else Verdict(ttft=True, tpot=met, e2el=True)
    assert timings_report([progress(52.0)], 50.0, 54.0, 70.0, verdict).met_slo is met
