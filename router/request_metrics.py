"""The metrics of requests that only a router knows: latencies, lengths, finishes and errors by model. Pure.

Names, labels and buckets of ``vllm:*`` are those of vLLM, so that its dashboards work. A model that is not served has
the label ``""``: clients choose that name, and each value would be a series of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields

from muxmesh.metrics.family import Family, Histogram, bounds_1_2_5, counter, histogram
from muxmesh.types import NO_WAITS, SOURCES, Waits
from router.request_record import RequestRecord
from router.slo_counts import SloCounts, verdict_of

MODEL = ("model_name",)
FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_GAP_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
)  # fmt: skip
"""vLLM's begin at 0.01; small models need less."""
REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
OVERHEAD_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.05, 0.1, 0.5, 1.0)
FINISHES = ("stop", "length", "abort", "error")
_SLO_TARGETS = {"ttft": "num_ttft_met", "tpot": "num_tpot_met", "both": "num_met", "e2e": "num_e2el_met"}
"""Value of the label `target` → field of `SloTally`."""


@dataclass(slots=True)
class ModelRequestMetrics:
    """The metrics of one model. Latencies are those of requests that have finished, except of first tokens and gaps."""

    lengths: tuple[float, ...]
    """Upper bounds of numbers of tokens."""
    first_token_s: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_S))
    gap_s: Histogram = field(default_factory=lambda: Histogram(TOKEN_GAP_S))
    longest_gap_s: Histogram = field(default_factory=lambda: Histogram(TOKEN_GAP_S))
    per_token_s: Histogram = field(default_factory=lambda: Histogram(TOKEN_GAP_S))
    e2e_s: Histogram = field(default_factory=lambda: Histogram(REQUEST_S))
    queue_s: Histogram = field(default_factory=lambda: Histogram(REQUEST_S))
    prefill_s: Histogram = field(default_factory=lambda: Histogram(REQUEST_S))
    decode_s: Histogram = field(default_factory=lambda: Histogram(REQUEST_S))
    overhead_s: Histogram = field(default_factory=lambda: Histogram(OVERHEAD_S))
    prompt_tokens: Histogram = field(init=False)
    output_tokens: Histogram = field(init=False)
    num_finished: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(FINISHES, 0)))
    num_ended: Counter[str] = field(default_factory=lambda: Counter(OK=0))
    """By gRPC status code."""
    num_restarts: int = 0
    num_overdue: int = 0
    num_predictions: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(SOURCES, 0)))
    """Requests by the origin of their expected output length."""
    waits: Waits = NO_WAITS
    slo: SloCounts = field(default_factory=SloCounts)

    def __post_init__(self) -> None:
        self.prompt_tokens, self.output_tokens = Histogram(self.lengths), Histogram(self.lengths)

    def first_token(self, record: RequestRecord, now_s: float) -> None:
        """The first token of a request is there."""
        self.first_token_s.observe(now_s - record.arrived_at_s)
        waited_s = record.progress[0].waited_s if record.progress else 0.0
        self.overhead_s.observe(max(0.0, now_s - record.arrived_at_s - waited_s))

    def ended(self, record: RequestRecord, status: str, now_s: float) -> None:
        """A request has ended. ``status``: name of its gRPC status code."""
        self.num_ended[status] += 1
        self.num_restarts += record.num_restarts
        self.waits = self.waits.plus(record.waits)
        self.num_overdue += record.execution(now_s).is_overdue
        if status != "OK" or record.verdict is None:  # else the client has got it, in the timings
            record.verdict = verdict_of(record, status, now_s)
        if record.verdict is not None:
            self.slo.add(record.verdict, now_s)
        if status != "OK":
            self.num_finished["abort" if status == "CANCELLED" else "error"] += 1
            return
        self.num_finished[record.finish] += 1
        queue_s, prefill_s, decode_s = record.phases_s(now_s)
        self.e2e_s.observe(now_s - record.arrived_at_s)
        self.queue_s.observe(queue_s)
        self.prefill_s.observe(prefill_s)
        self.decode_s.observe(decode_s)
        self.prompt_tokens.observe(record.num_prompt_tokens)
        self.output_tokens.observe(record.num_output_tokens)
        tokens_after_first = record.num_output_tokens / len(record.progress) - 1
        if tokens_after_first > 0:
            self.per_token_s.observe(decode_s / tokens_after_first)
            self.longest_gap_s.observe(record.longest_gap_s)


class RequestMetrics:
    """Owns the metrics of all models. ``max_model_lens``: model name → its longest context in tokens."""

    def __init__(self, max_model_lens: Mapping[str, int]) -> None:
        self._models = {
            name: ModelRequestMetrics(bounds_1_2_5(max_tokens)) for name, max_tokens in max_model_lens.items()
        }
        self._not_served = ModelRequestMetrics(())

    def add_model(self, model: str, max_model_len: int) -> None:
        self._models[model] = ModelRequestMetrics(bounds_1_2_5(max_model_len))

    def remove_model(self, model: str) -> None:
        """Its running requests count as those of models that are not served."""
        del self._models[model]

    def of(self, model: str) -> ModelRequestMetrics:
        """The metrics of ``model``, or of all models that are not served."""
        return self._models.get(model, self._not_served)

    def families(self) -> Iterator[Family]:
        """All metrics, with the values of now."""
        yield from self._histograms()
        yield counter(
            "vllm:request_success_total", "Requests that ended, by reason.", ("model_name", "finished_reason"),
            {(name, reason): n for name, one in self._models.items() for reason, n in one.num_finished.items()},
        )  # fmt: skip
        yield counter(
            "muxmesh_requests_total", "Requests that ended, by gRPC status code; model_name is empty if not served.",
            ("model_name", "code"),
            {(name, code): n for name, one in self._with_others() for code, n in one.num_ended.items()},
        )  # fmt: skip
        yield counter(
            "muxmesh_request_restarts_total", "Attempts of requests that failed and were repeated.", MODEL,
            {(name,): one.num_restarts for name, one in self._models.items()},
        )  # fmt: skip
        yield counter(
            "muxmesh_request_wait_seconds_total", "Seconds that requests waited before their first token, by cause.",
            ("model_name", "cause"),
            {
                (name, cause.name.removesuffix("_s")): getattr(one.waits, cause.name)
                for name, one in self._models.items()
                for cause in fields(Waits)
            },
        )  # fmt: skip
        yield counter(
            "muxmesh_overdue_requests_total", "Requests that waited for order.max_wait_s before they ended.", MODEL,
            {(name,): one.num_overdue for name, one in self._models.items()},
        )  # fmt: skip
        yield counter(
            "muxmesh_predictions_total", "Requests by the origin of their expected output length.",
            ("model_name", "source"),
            {(name, source): n for name, one in self._models.items() for source, n in one.num_predictions.items()},
        )  # fmt: skip
        totals = {name: one.slo.total for name, one in self._models.items()}
        yield counter(
            "muxmesh_slo_requests_total", "Requests that count for the SLO of their model.", MODEL,
            {(name,): total.num_requests for name, total in totals.items()},
        )  # fmt: skip
        yield counter(
            "muxmesh_slo_met_total", "Those among them that met a target: ttft, tpot, both, or the end-to-end rule.",
            ("model_name", "target"),
            {
                (name, target): getattr(total, counted)
                for name, total in totals.items()
                for target, counted in _SLO_TARGETS.items()
            },
        )  # fmt: skip

    def _with_others(self) -> Iterator[tuple[str, ModelRequestMetrics]]:
        yield from self._models.items()
        yield "", self._not_served

    def _histograms(self) -> Iterator[Family]:
        for name, help_text, attribute in (
            ("vllm:time_to_first_token_seconds", "Seconds from the arrival to the first token.", "first_token_s"),
            ("vllm:inter_token_latency_seconds", "Seconds between two tokens of a sequence.", "gap_s"),
            ("muxmesh_longest_token_gap_seconds", "Longest gap in the tokens of finished requests.", "longest_gap_s"),
            ("vllm:request_time_per_output_token_seconds", "Seconds for each token after the first.", "per_token_s"),
            ("vllm:e2e_request_latency_seconds", "Seconds from the arrival to the last token.", "e2e_s"),
            ("vllm:request_queue_time_seconds", "Seconds from the arrival to the first credit.", "queue_s"),
            ("vllm:request_prefill_time_seconds", "Seconds from the credit to the first token.", "prefill_s"),
            ("vllm:request_decode_time_seconds", "Seconds from the first token to the last.", "decode_s"),
            ("vllm:request_prompt_tokens", "Prompt tokens of finished requests.", "prompt_tokens"),
            ("vllm:request_generation_tokens", "Output tokens of finished requests.", "output_tokens"),
            ("muxmesh_router_overhead_seconds", "Time to first token without waits and prefill.", "overhead_s"),
        ):
            yield histogram(name, help_text, MODEL, {(k,): getattr(one, attribute) for k, one in self._models.items()})
