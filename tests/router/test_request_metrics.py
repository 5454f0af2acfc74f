import pytest
from prometheus_client.parser import text_string_to_metric_families

from muxmesh.config.slo_config import SloConfig
from muxmesh.execution import Execution
from muxmesh.metrics.exposition import render
from muxmesh.slo import RequestSlo, Verdict
from muxmesh.types import SOURCES, Waits
from router.attempt import Prefilled
from router.generation import FinishKind
from router.request_metrics import RequestMetrics
from router.request_record import RequestRecord
from router.sequence_driver import Progress

Samples = dict[tuple[str, ...], float]


def samples(metrics: RequestMetrics, name: str) -> Samples:
    """The samples of a name, without those of buckets, by the model and the values of the other labels."""
    found: Samples = {}
    for family in text_string_to_metric_families(render(metrics.families()).decode()):
        for sample in family.samples:
            if sample.name == name:
                others = [value for label, value in sample.labels.items() if label != "model_name"]
                found[sample.labels["model_name"], *others] = sample.value
    return found


def record(num_output_tokens: int = 0, *finishes: FinishKind, num_sequences: int = 1) -> RequestRecord:
    """Arrived at 100 s, got its credit at 101 s and its first token at 104 s."""
    found = RequestRecord("r", 100.0, "m")
    progress = [Progress(credited_at_s=101.0, waited_s=2.5, prefilled=Prefilled(3)) for _ in range(num_sequences)]
    progress[0].waits, progress[-1].num_restarts = Waits(kv_s=0.75, device_s=0.5), 2
    found.begin(7, progress)
    found.first_token_at_s = 104.0
    found.add_tokens(0, num_output_tokens, 104.0)
    found.finishes.extend(finishes)
    return found


def test_a_request_that_has_finished_is_measured() -> None:
    metrics = RequestMetrics({"m": 100, "n": 100})
    done = record(5, FinishKind.EOS)
    metrics.of("m").first_token(done, 104.0)
    metrics.of("m").ended(done, "OK", 112.0)
    for name, value in {
        "vllm:time_to_first_token_seconds": 4,
        "vllm:e2e_request_latency_seconds": 12,
        "vllm:request_queue_time_seconds": 1,
        "vllm:request_prefill_time_seconds": 3,
        "vllm:request_decode_time_seconds": 8,
        "vllm:request_time_per_output_token_seconds": 2,
        "vllm:request_prompt_tokens": 7,
        "vllm:request_generation_tokens": 5,
        "muxmesh_router_overhead_seconds": 1.5,
    }.items():
        assert samples(metrics, f"{name}_sum") == {("m",): pytest.approx(value), ("n",): 0}, name
        assert samples(metrics, f"{name}_count") == {("m",): 1, ("n",): 0}, name
    assert samples(metrics, "vllm:request_success_total")["m", "stop"] == 1
    assert samples(metrics, "muxmesh_requests_total") == {("m", "OK"): 1, ("n", "OK"): 0, ("", "OK"): 0}
    assert samples(metrics, "muxmesh_request_restarts_total") == {("m",): 2, ("n",): 0}
    waits = samples(metrics, "muxmesh_request_wait_seconds_total")
    assert (waits["m", "kv"], waits["m", "device"], waits["m", "order"]) == (0.75, 0.5, 0)


def test_a_request_with_an_slo_counts_for_each_target_that_it_met() -> None:
    metrics = RequestMetrics({"m": 100, "n": 100})
    done = record(5, FinishKind.EOS)  # TTFT 4 s, 8 s for the four tokens after it
    done.slo = RequestSlo(SloConfig(ttft_s=4.0, tpot_s=1.9))
    metrics.of("m").ended(done, "OK", 112.0)
    assert samples(metrics, "muxmesh_slo_requests_total") == {("m",): 1, ("n",): 0}
    met = {
        target: value for (model, target), value in samples(metrics, "muxmesh_slo_met_total").items() if model == "m"
    }
    assert met == {"ttft": 1, "tpot": 0, "both": 0, "e2e": 0}
    assert done.verdict == Verdict(ttft=True, tpot=False, e2el=False)


@pytest.mark.parametrize(("status", "num_counted"), [("OK", 1), ("CANCELLED", 0)])
def test_the_outcome_that_the_client_was_sent_counts_unless_the_request_was_cancelled(
    status: str, num_counted: int
) -> None:
    metrics = RequestMetrics({"m": 100})
    done = record(5, FinishKind.EOS)
    done.slo = RequestSlo(SloConfig(ttft_s=4.0, tpot_s=1.9))
    done.verdict = Verdict(ttft=True, tpot=True, e2el=True)  # with the last token; now it is later
    metrics.of("m").ended(done, status, 112.0)
    assert samples(metrics, "muxmesh_slo_requests_total") == {("m",): num_counted}
    assert samples(metrics, "muxmesh_slo_met_total")["m", "both"] == num_counted
    assert (done.verdict is None) == (num_counted == 0)


@pytest.mark.parametrize(
    ("finishes", "reason"),
    [
        ([FinishKind.EOS], "stop"),
        ([FinishKind.STOP_TOKEN], "stop"),
        ([FinishKind.STOP_STRING], "stop"),
        ([FinishKind.LENGTH], "length"),
        ([FinishKind.EOS, FinishKind.LENGTH], "length"),
    ],
)
def test_a_finish_has_the_name_that_vllm_gives_it(finishes: list[FinishKind], reason: str) -> None:
    metrics = RequestMetrics({"m": 100})
    metrics.of("m").ended(record(5, *finishes, num_sequences=len(finishes)), "OK", 112.0)
    assert {key for key, value in samples(metrics, "vllm:request_success_total").items() if value} == {("m", reason)}


@pytest.mark.parametrize(("status", "reason"), [("CANCELLED", "abort"), ("INTERNAL", "error")])
def test_a_request_that_did_not_finish_has_no_latency(status: str, reason: str) -> None:
    metrics = RequestMetrics({"m": 100})
    metrics.of("m").ended(record(5), status, 112.0)
    assert samples(metrics, "vllm:e2e_request_latency_seconds_count") == {("m",): 0}
    assert samples(metrics, "muxmesh_requests_total")["m", status] == 1
    assert samples(metrics, "vllm:request_success_total")["m", reason] == 1


def test_models_that_are_not_served_share_one_label() -> None:
    metrics = RequestMetrics({"m": 100})
    for name in ("a", "b", 'x"}'):
        metrics.of(name).ended(RequestRecord("r", 100.0, name), "NOT_FOUND", 101.0)
    assert samples(metrics, "muxmesh_requests_total") == {("m", "OK"): 0, ("", "OK"): 0, ("", "NOT_FOUND"): 3}


def test_the_gaps_between_tokens_are_those_of_each_sequence() -> None:
    gaps: list[tuple[float, int]] = []
    both = RequestRecord("r", 100.0)
    both.begin(1, [Progress(), Progress()], lambda gap_s, count: gaps.append((gap_s, count)))
    for index, num_tokens, now_s in ((0, 1, 101.0), (1, 1, 102.0), (0, 1, 103.0), (1, 4, 104.0)):
        both.add_tokens(index, num_tokens, now_s)
    assert gaps == [(2.0, 1), (0.5, 4)]
    assert both.longest_gap_s == 2.0
    assert both.num_output_tokens == 7


def test_the_longest_gap_of_a_finished_request_is_measured() -> None:
    metrics, done = RequestMetrics({"m": 100}), record(1, FinishKind.EOS)
    for at_s in (104.5, 107.5, 108.0):
        done.add_tokens(0, 1, at_s)
    metrics.of("m").ended(done, "OK", 108.0)
    metrics.of("m").ended(record(1, FinishKind.EOS), "OK", 108.0)
    assert samples(metrics, "muxmesh_longest_token_gap_seconds_sum") == {("m",): 3.0}
    assert samples(metrics, "muxmesh_longest_token_gap_seconds_count") == {("m",): 1}, "one token has no gap"


def test_one_token_has_no_time_for_each_further_token() -> None:
    metrics = RequestMetrics({"m": 100})
    metrics.of("m").ended(record(1, FinishKind.LENGTH), "OK", 112.0)
    assert samples(metrics, "vllm:request_time_per_output_token_seconds_count") == {("m",): 0}


@pytest.mark.parametrize(
    ("max_wait_s", "in_worker", "is_overdue"), [(1.5, False, False), (1.0, False, True), (50.0, True, True)]
)
def test_a_request_is_overdue_from_its_wait_for_a_credit_or_from_what_its_worker_reports(
    max_wait_s: float, in_worker: bool, is_overdue: bool
) -> None:
    """It got its credit after 1 s."""
    metrics, done = RequestMetrics({"m": 100, "n": 100}), record(5, FinishKind.EOS)
    done.max_wait_s = max_wait_s
    done.progress[0].ended = Execution(is_overdue=in_worker)
    metrics.of("m").ended(done, "OK", 112.0)
    assert samples(metrics, "muxmesh_overdue_requests_total") == {("m",): is_overdue, ("n",): 0}


def test_a_request_that_ends_in_the_queue_is_overdue_too() -> None:
    metrics, waiting = RequestMetrics({"m": 100}), RequestRecord("r", 100.0, "m", max_wait_s=10.0)
    metrics.of("m").ended(waiting, "CANCELLED", 109.0)
    assert samples(metrics, "muxmesh_overdue_requests_total") == {("m",): 0}
    metrics.of("m").ended(waiting, "CANCELLED", 110.0)
    assert samples(metrics, "muxmesh_overdue_requests_total") == {("m",): 1}


def test_requests_are_counted_by_the_source_of_their_length() -> None:
    metrics = RequestMetrics({"m": 100})
    metrics.of("m").num_predictions["hint"] += 2
    counted = samples(metrics, "muxmesh_predictions_total")
    assert {source: n for (_, source), n in counted.items() if n} == {"hint": 2}
    assert {source for _, source in counted} == set(SOURCES), "all are there from the start"
