import pytest

from benchmarks.shared_device.disturbance import attained, buckets, largest_gap_s, others_kept, recovered_after_s
from loadtest.record import OK, Record
from loadtest.slo import Unloaded

UNLOADED = dict.fromkeys(("a", "b", "c"), Unloaded(0.0, 0.0, 0.1))


def record(model: str, due_s: float, e2el_s: float, status: str = OK) -> Record:
    one = Record(0, due_s, model, sent_s=due_s, ended_s=due_s + e2el_s, status=status, num_output=10)
    one.pieces = [(due_s + 0.1, 1), (due_s + e2el_s, 9)]
    return one


def test_late_and_failed_requests_do_not_attain_the_slo() -> None:
    records = [record("a", 0, 3.9), record("a", 0, 4.1), record("a", 0, 1, "UNAVAILABLE"), record("a", 0, 1)]
    assert attained(records, UNLOADED, 4) == 0.5
    assert attained([], UNLOADED, 4) == 1.0


def test_what_the_others_keep_is_that_of_the_model_that_suffers_most() -> None:
    quiet = [record(model, due, 1) for model in ("a", "b", "c") for due in range(4)]
    loud = [record("a", 0, 99), *(record("b", due, 1) for due in range(4)), record("c", 0, 1), record("c", 1, 99)]
    assert others_kept(quiet, loud, ["b", "c"], UNLOADED, 4) == 0.5
    assert others_kept(quiet, quiet, ["b", "c"], UNLOADED, 4) == 1.0


def test_attainment_over_time_has_no_bucket_without_a_request() -> None:
    levels = buckets([record("a", 0.5, 1), record("a", 5, 99)], UNLOADED, 4, 10.0, 2.0)
    assert [(one.at_s, one.attained) for one in levels] == [(0.0, 1.0), (4.0, 0.0)]


@pytest.mark.parametrize(("late_until_s", "expected_s"), [(20.0, 0.0), (23.0, 2.5), (99.0, 19.0)])
def test_recovery_is_the_time_until_requests_attain_the_level_again(late_until_s: float, expected_s: float) -> None:
    records = [record("a", due, 99 if due < late_until_s else 1) for due in range(20, 40)]
    assert recovered_after_s(records, UNLOADED, 4, 20.0, 0.95) == pytest.approx(expected_s)


def test_the_longest_pause_of_other_models_is_the_one_that_overlaps_the_fault() -> None:
    records = [record("a", 5, 90), record("b", 1, 2), record("b", 9, 3), record("b", 40, 30)]
    assert largest_gap_s(records, ["b"], 10, 25) == pytest.approx(2.9)
    assert largest_gap_s(records, ["c"], 10, 25) == 0.0
