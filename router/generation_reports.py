"""What a router reports of a request beside its output: the prompt, the scheduling and the times. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from muxmesh.scheduling_policy import SchedulingPolicy
from muxmesh.slo import Verdict
from muxmesh.types import EngineRequest
from router.expected_work import ExpectedOutput
from router.generation import PromptReport, SchedulingReport, TimingsReport
from router.length_forecast import LengthForecast
from router.sequence_driver import Progress


def prompt_report(request: EngineRequest, forecast: LengthForecast, progress: Progress) -> PromptReport:
    """The prompt as the sequence of ``progress`` has computed it. A length that no predictor gave is not reported."""
    predicted_tokens = None
    if forecast.checked:
        expected = ExpectedOutput(forecast.prediction, forecast.source, request.stopping)
        predicted_tokens = max(1, round(expected.prediction.p50_tokens))
    return PromptReport(
        request.prompt_token_ids,
        progress.prefilled.num_cached_tokens if progress.prefilled else 0,
        request.sampling.seed,
        predicted_tokens,
        progress.prefilled.logprobs if progress.prefilled else (),
    )


def scheduling_report(
    request: EngineRequest,
    forecast: LengthForecast,
    progress: Progress,
    arrived_at_s: float,
    policy: SchedulingPolicy,
) -> SchedulingReport:
    """Why the first sequence of a request was admitted when it was. ``arrived_at_s``: monotonic time.

    The work is that by which the unit ordered the request, and the lengths are those that it is the work of.
    """
    credit, chosen, waited_s = progress.credit, progress.chosen, progress.queued_s(arrived_at_s)
    scheduling = credit.scheduling if credit else request.scheduling
    prediction = request.prediction or forecast.prediction
    return SchedulingReport(
        policy=policy.name,
        reason=policy.reason(scheduling, scheduling.arrived_at_s + waited_s),
        p50_output_tokens=prediction.p50_tokens,
        p90_output_tokens=prediction.p90_tokens,
        source=forecast.source,
        prefill_s=scheduling.prefill_s,
        decode_s=scheduling.decode_s,
        waited_s=waited_s,
        decision=credit.decision if credit else 0,
        num_overtaken=credit.num_overtaken if credit else 0,
        waited_for=progress.waits,
        unit=chosen.link.name if chosen else "",
        unit_reason=chosen.choice.text if chosen else "",
    )


def timings_report(
    sequences: Sequence[Progress],
    arrived_at_s: float,
    first_token_at_s: float,
    ended_at_s: float,
    verdict: Verdict | None = None,
) -> TimingsReport:
    """The times of a request, in monotonic time. ``router_s`` is the TTFT without the waits for credits and prefill."""
    first = sequences[0]
    return TimingsReport(
        queue_s=first.queued_s(arrived_at_s),
        ttft_s=first_token_at_s - arrived_at_s,
        e2e_s=ended_at_s - arrived_at_s,
        num_restarts=sum(sequence.num_restarts for sequence in sequences),
        router_s=max(0.0, first_token_at_s - arrived_at_s - first.waited_s),
        met_slo=None if verdict is None else verdict.met,
    )
