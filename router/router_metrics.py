"""The metrics of a router that are its state of now: read at each scrape from the parts that own it. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from muxmesh.metrics.family import Family, Labels, counter, gauge, histogram
from router.length_forecast import OBSERVED_SOURCES, LengthForecaster
from router.pipeline import GenerationPipeline
from router.request_metrics import MODEL
from router.served_models import ServedModels
from router.units import Units


def router_families(
    models: ServedModels, pipeline: GenerationPipeline, forecaster: LengthForecaster, units: Units, unix_s: float
) -> Iterator[Family]:
    """``unix_s``: the time of now, on the clock of the requests' arrivals."""
    names = [model.name for model in models]
    counters = {name: pipeline.counters[name] for name in names}
    waiting: dict[Labels, float] = {(name,): pipeline.num_waiting(name) for name in names}
    running: dict[Labels, float] = {(name,): counters[name].num_running - waiting[name,] for name in names}
    yield gauge("vllm:num_requests_waiting", "Sequences that wait for tokenization or a credit.", MODEL, waiting)
    yield gauge("vllm:num_requests_running", "Sequences that workers compute.", MODEL, running)
    yield gauge("muxmesh_requests_waiting", "As vllm:num_requests_waiting, for autoscalers.", MODEL, waiting)
    yield gauge("muxmesh_requests_running", "As vllm:num_requests_running, for autoscalers.", MODEL, running)
    yield gauge(
        "muxmesh_oldest_waiting_seconds", "Age of the oldest request that waits for a credit.", MODEL,
        {(name,): units.oldest_queued_s(name, unix_s) for name in names},
    )  # fmt: skip
    yield counter(
        "vllm:prompt_tokens_total", "Prompt tokens of requests, cached ones too.", MODEL,
        {(name,): one.prompt_tokens for name, one in counters.items()},
    )  # fmt: skip
    yield counter(
        "vllm:generation_tokens_total", "Output tokens.", MODEL,
        {(name,): one.output_tokens for name, one in counters.items()},
    )  # fmt: skip
    yield gauge(
        "muxmesh_unit_connected", "1 if this router is connected to the unit.", ("unit",),
        {(unit.name,): int(unit.admission.connected.is_set()) for unit in units},
    )  # fmt: skip
    yield gauge(
        "muxmesh_residency_blocks", "Token blocks in the unit's prefix cache, as far as this router knows.", ("unit",),
        {(unit.name,): units.residency.num_blocks(unit.name) for unit in units},
    )  # fmt: skip
    yield counter(
        "muxmesh_unit_choices_total", "Choices of a unit for an attempt, by reason; moves of queued requests count.",
        ("unit", "reason"),
        {(unit, reason.value): count for (unit, reason), count in units.num_choices.items()},
    )  # fmt: skip
    yield counter(
        "muxmesh_unit_choice_cached_tokens_total", "Tokens that these attempts found in the prefix cache.",
        ("unit", "reason"),
        {(unit, reason.value): count for (unit, reason), count in units.num_cached_tokens.items()},
    )  # fmt: skip
    yield from _predictor(forecaster, names)


def _predictor(forecaster: LengthForecaster, names: list[str]) -> Iterator[Family]:
    taus: dict[Labels, float] = {(name,): tau for name in names if (tau := forecaster.tau(name)) is not None}
    yield gauge(
        "muxmesh_predictor_tau", "Kendall's tau of predicted and actual output lengths; absent before 100 of them.",
        MODEL, taus,
    )  # fmt: skip
    yield gauge(
        "muxmesh_predictions_used", "0 while predictions are not used because they do not rank.", MODEL,
        {(name,): int(forecaster.is_ranking(name)) for name in names},
    )  # fmt: skip
    yield histogram(
        "muxmesh_output_length_ratio", "Output tokens divided by the predicted median, of outputs that ended by "
        "themselves.", MODEL, {(name,): forecaster.length_ratio(name) for name in names},
    )  # fmt: skip
    yield histogram(
        "muxmesh_prediction_log_error", "Absolute logarithm of output tokens divided by the predicted median.",
        ("model_name", "source"),
        {(name, source): forecaster.log_error(name, source) for name in names for source in OBSERVED_SOURCES},
    )  # fmt: skip
    yield counter(
        "muxmesh_predictions_late_total", "Requests that got the mean length, as the predictor was too slow.", (),
        {(): forecaster.num_late},
    )  # fmt: skip
    yield counter(
        "muxmesh_predictor_failures_total", "Errors and unusable results of the predictor.", (),
        {(): forecaster.num_failures},
    )  # fmt: skip
