import pytest

from benchmarks.shared_device.outcome import Outcome, median_of, median_ratio, of_the_best, outcome, weighted
from loadtest.record import INTERRUPTED, OK, Record, Run
from loadtest.slo import Unloaded

UNLOADED = {"a": Unloaded(0.0, 0.0, 0.1), "b": Unloaded(0.0, 0.0, 0.2)}
RATES = {"a": 3.0, "b": 1.0}


def record(model: str, due_s: float, ended_s: float | None, status: str = OK, tokens: int = 10) -> Record:
    """Its first token arrives half a second after it was due, all others at the end."""
    one = Record(int(due_s * 1000), due_s, model, sent_s=due_s, ended_s=ended_s, status=status)
    if ended_s is not None and status == OK:
        one.num_output = tokens
        one.pieces = [(due_s + 0.5, 1), (ended_s, tokens - 1)]
    return one


def shown(*records: Record, duration_s: float = 20.0) -> Outcome:
    return outcome("adbs", Run(list(records), duration_s), RATES, UNLOADED, (2.0, 12.0))


def test_throughput_counts_what_ends_in_the_window_and_is_weighted_by_the_rates() -> None:
    found = shown(record("a", 1, 1.9), record("a", 1, 3), record("a", 4, 11), record("b", 5, 13), record("b", 5, 6))
    assert found.per_model["a"]["requests"] == pytest.approx(0.2)
    assert found.per_model["b"]["requests"] == pytest.approx(0.1)
    assert found.throughput == pytest.approx((3 * 0.2 + 1 * 0.1) / 4)
    assert found.per_model["a"]["tokens"] == pytest.approx((9 + 10) / 10)


def test_the_slo_of_a_request_is_a_multiple_of_its_own_unloaded_latency() -> None:
    found = shown(record("a", 3, 6.9), record("a", 4, 8.1), record("b", 5, 8.9))
    assert found.attainment_of["a"][4] == 0.5
    assert found.attainment_of["b"][2] == 1.0
    assert found.attainment[4] == pytest.approx(2 / 3)
    assert found.attainment[16] == 1.0


def test_failed_requests_miss_the_slo_and_running_ones_if_they_are_late() -> None:
    done, failed = record("a", 3, 4), record("a", 4, 5, status="UNAVAILABLE")
    late, early = record("a", 5, None, INTERRUPTED), record("a", 11.9, None, INTERRUPTED)
    assert shown(done, failed).attainment[8] == 0.5
    assert shown(done, late).attainment[8] == 0.5
    assert shown(done, early, duration_s=13.0).attainment[8] == 1.0
    assert shown(done, failed).failed == 1
    assert shown(done, late).failed == 0


def test_latencies_are_those_of_requests_that_were_due_in_the_window() -> None:
    found = shown(record("a", 1, 11), record("a", 3, 4.4))
    assert found.p99_tpot_s == pytest.approx(0.1)
    assert found.p99_ttft_s == pytest.approx(0.5)


def test_a_ratio_is_the_median_of_the_ratios_of_the_rounds() -> None:
    fast, slow = shown(record("a", 3, 4), record("a", 3, 4)), shown(record("a", 3, 4))
    rounds = [fast, as_system(slow), slow, as_system(slow), slow, as_system(slow)]
    assert median_ratio(rounds, "adbs", "spatial", "throughput") == 1.0
    assert median_ratio(rounds[:2], "adbs", "spatial", "throughput") == 2.0
    assert median_of(rounds, "adbs", "attainment@16") == 1.0


def as_system(one: Outcome) -> Outcome:
    return Outcome(**(one.as_json() | {"system": "spatial"}))


def test_a_weighted_mean_of_equal_values_is_that_value() -> None:
    assert weighted({"a": 2.0, "b": 2.0}, RATES) == 2.0


def test_adbs_is_compared_with_the_best_mode_and_equal_to_it_if_none_attains_anything() -> None:
    assert of_the_best({"adbs": 0.6, "spatial": 0.8}) == pytest.approx(0.75)
    assert of_the_best({"adbs": 0.0, "spatial": 0.0}) == 1.0
