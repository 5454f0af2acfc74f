"""Which requests count for an SLO, and how many met it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.config.slo_config import SloConfig
from muxmesh.slo import FAILED, RequestSlo, Verdict
from router.request_record import RequestRecord
from router.sequence_driver import Progress
from router.slo_counts import WINDOW_S, SloCounts, SloTally, verdict_of

MET, SLOW = Verdict(ttft=True, tpot=True, e2el=True), Verdict(ttft=True, tpot=False, e2el=True)


def record(*num_output: int, slo: SloConfig | None = None) -> RequestRecord:
    """Arrived at 100 s, with its first token at 104 s. ``num_output``: of each sequence, by default one of 5 tokens."""
    found, lengths = RequestRecord("r", 100.0, "m", first_token_at_s=104.0), num_output or (5,)
    found.begin(7, [Progress() for _ in lengths])
    for index, num_tokens in enumerate(lengths):
        found.add_tokens(index, num_tokens, 104.0)
    found.slo = RequestSlo(slo or SloConfig(ttft_s=4, tpot_s=2))
    return found


@pytest.mark.parametrize(
    ("one", "ended_at_s", "verdict"),
    [
        (record(), 112.0, Verdict(ttft=True, tpot=True, e2el=True)),
        (record(), 112.1, Verdict(ttft=True, tpot=False, e2el=False)),
        (record(slo=SloConfig(ttft_s=3.9)), 112.0, Verdict(ttft=False, tpot=True, e2el=True)),
        (record(1), 104.0, Verdict(ttft=True, tpot=True, e2el=True)),
        (record(1, 5, 2), 112.0, Verdict(ttft=True, tpot=True, e2el=True)),  # as long as its longest sequence takes
        (record(1, 5, 2), 112.1, Verdict(ttft=True, tpot=False, e2el=False)),
    ],
)
def test_a_request_that_finished_is_judged_by_its_latencies(
    one: RequestRecord, ended_at_s: float, verdict: Verdict
) -> None:
    assert verdict_of(one, "OK", ended_at_s) == verdict


@pytest.mark.parametrize("status", ["INTERNAL", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"])
def test_a_request_that_failed_or_was_refused_missed_its_slo(status: str) -> None:
    assert verdict_of(record(), status, 105.0) == FAILED


@pytest.mark.parametrize("status", ["CANCELLED", "INVALID_ARGUMENT", "NOT_FOUND"])
def test_a_request_that_the_client_ended_or_that_is_invalid_does_not_count(status: str) -> None:
    assert verdict_of(record(), status, 105.0) is None


def test_a_request_of_a_model_without_an_slo_does_not_count() -> None:
    assert verdict_of(RequestRecord("r", 100.0, "m"), "OK", 105.0) is None


def test_the_tallies_are_of_all_time_and_of_the_last_minute() -> None:
    counts = SloCounts()
    counts.add(MET, 1000.0)
    counts.add(SLOW, 1030.0)
    counts.add(FAILED, 1030.0)
    assert counts.total == counts.recent(1031.0) == SloTally(3, 1, 2, 1, 2)
    assert counts.recent(1070.0) == SloTally(2, 0, 1, 0, 1)
    assert counts.recent(1100.0) == SloTally()
    assert counts.total == SloTally(3, 1, 2, 1, 2)


@given(st.lists(st.tuples(st.floats(0, 20), st.sampled_from([MET, SLOW, FAILED])), max_size=60))
def test_the_recent_tally_has_every_request_of_the_window_and_none_that_is_a_bucket_older(
    steps: list[tuple[float, Verdict]],
) -> None:
    counts, ended, now_s = SloCounts(), [], 500.0
    for gap_s, verdict in steps:
        now_s += gap_s
        counts.add(verdict, now_s)
        ended.append(now_s)
    recent = counts.recent(now_s)
    assert recent.num_requests >= sum(one > now_s - WINDOW_S + 5 for one in ended)
    assert recent.num_requests <= sum(one > now_s - WINDOW_S for one in ended)
