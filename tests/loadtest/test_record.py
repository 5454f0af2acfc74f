import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.record import INTERRUPTED, OK, Record, Run
from tests.support.loadtest_reports import make_record


def test_latencies_count_from_when_the_request_was_due() -> None:
    record = make_record(0, 1.0, (3.0, 5.0), 6.0, sent_s=2.5)
    assert (record.ttft_s, record.e2el_s) == (2.0, 5.0)


def test_the_ttft_of_an_output_without_tokens_is_its_latency() -> None:
    record = make_record(0, 1.0, (), 4.0)
    assert record.ttft_s == record.e2el_s == 3.0


@pytest.mark.parametrize(("num_output", "tpot_s"), [(0, None), (1, None), (2, 2.0), (5, 0.5)])
def test_tpot_is_the_mean_over_the_tokens_after_the_first(num_output: int, tpot_s: float | None) -> None:
    assert make_record(0, 0.0, (1.0,), 3.0, num_output=num_output).tpot_s == tpot_s


def test_itl_is_the_gap_between_messages_whatever_number_of_tokens_they_carry() -> None:
    record = Record(0, 0.0, pieces=[(1.0, 1), (1.5, 3), (3.0, 2)])
    assert record.itls_s == [0.5, 1.5]
    assert Record(0, 0.0, pieces=[(1.0, 1)]).itls_s == Record(0, 0.0).itls_s == []


@pytest.mark.parametrize(("num_output", "normalized_s"), [(0, 6.0), (1, 6.0), (4, 1.5)])
def test_the_normalized_latency_is_per_output_token(num_output: int, normalized_s: float) -> None:
    assert make_record(0, 0.0, (1.0,), 6.0, num_output=num_output).normalized_s == normalized_s


@given(
    st.floats(0, 100),
    st.lists(st.floats(0.001, 10), min_size=2, max_size=8),
)
def test_ttft_and_tpot_add_up_to_the_latency(due_s: float, gaps_s: list[float]) -> None:
    times_s = tuple(due_s + sum(gaps_s[: count + 1]) for count in range(len(gaps_s)))
    record = make_record(0, due_s, times_s)
    assert record.tpot_s is not None
    assert record.ttft_s + record.tpot_s * (len(times_s) - 1) == pytest.approx(record.e2el_s)
    assert sum(record.itls_s) == pytest.approx(record.e2el_s - record.ttft_s)


@pytest.mark.parametrize(("status", "is_ok"), [(OK, True), (INTERRUPTED, False), ("UNAVAILABLE", False)])
def test_only_the_status_ok_is_a_success(status: str, is_ok: bool) -> None:
    assert make_record(status=status).is_ok == is_ok


def test_a_request_is_interrupted_until_its_outcome_is_known() -> None:
    record = Record(0, 0.0)
    assert (record.status, record.sent_s, record.num_cached) == (INTERRUPTED, None, None)


def test_the_latency_of_a_request_that_has_not_ended_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        _ = Record(0, 0.0, pieces=[(1.0, 1)]).e2el_s


def test_records_and_runs_share_no_list() -> None:
    assert Record(0, 0.0).pieces is not Record(1, 0.0).pieces
    assert Run([]).loop_lags_s is not Run([]).loop_lags_s
