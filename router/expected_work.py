"""Expected work of requests in seconds, by which they are ordered, from predicted output lengths. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from muxmesh.step_cost import UNMEASURED, ModelCosts
from muxmesh.types import UNPREDICTED, LengthPrediction, SchedulingState, Stopping

_MIN_RATE = 1 / 100
"""The mean work is that of about the last 100 predicted requests."""


def fixed_length(stopping: Stopping, has_stop_strings: bool) -> int | None:
    """The output length in tokens if the request itself fixes it, else None."""
    never_stops = not (stopping.eos_token_ids or stopping.stop_token_ids or has_stop_strings)
    if never_stops or (stopping.min_new_tokens == stopping.max_new_tokens and not has_stop_strings):
        return stopping.max_new_tokens
    return None


@dataclass(frozen=True, slots=True)
class ModelService:
    """How a unit serves a model. ``costs`` is None before its first step; ``step_token_budget``: tokens in a step;
    ``max_num_seqs``: slots of a batch.
    """

    model: str
    costs: ModelCosts | None
    step_token_budget: int
    max_num_seqs: int


@dataclass(frozen=True, slots=True)
class ExpectedOutput:
    """The expected length of an output that has not begun: a prediction, its source (see `LengthForecast`) and the
    request's own limits.
    """

    unclipped: LengthPrediction
    source: str
    stopping: Stopping

    @property
    def prediction(self) -> LengthPrediction:
        """The prediction, clipped to the limits."""
        least, most = max(1, self.stopping.min_new_tokens), self.stopping.max_new_tokens
        return LengthPrediction(
            min(max(self.unclipped.p50_tokens, least), most), min(max(self.unclipped.p90_tokens, least), most)
        )


@dataclass(frozen=True, slots=True)
class ExpectedRequest:
    """A request with its expected work, and the prediction from which the work was computed.

    The prediction of an unpredicted request is that of its whole model: its own limits change neither.
    """

    scheduling: SchedulingState
    prediction: LengthPrediction


@dataclass(frozen=True, slots=True)
class _EqualWork:
    """The work that all unpredicted requests of a model share, and the mean work beside it: both affect the order.

    ``prediction``: the length of which ``work_s`` is the work.
    """

    work_s: float
    mean_work_s: float
    prediction: LengthPrediction


@dataclass(slots=True)
class _RecentRequests:
    """The share of a model in the recent predicted requests of a unit, in [0, 1], and per request of the unit: tokens
    of prompts and decode steps of this model. ``work_s``: the work of the model's mean request.
    """

    share: float = 0.0
    prompt_tokens: float = 0.0
    decode_steps: float = 0.0
    work_s: float = 0.0

    def decay(self, factor: float) -> None:
        self.share *= factor
        self.prompt_tokens *= factor
        self.decode_steps *= factor


class _MeanWork:
    """The mean work of a unit's recent predicted requests in seconds, by the step costs that each model had last.

    Averages tokens rather than seconds: a step of a full batch takes several times as long as one of an almost empty
    batch, and a mean of seconds would follow such a change late. All work would be above or below the mean meanwhile,
    which orders by arrival. So would a mean that includes unpredicted requests, whose work is a guess.
    """

    def __init__(self) -> None:
        self._count = 0
        self._models: dict[str, _RecentRequests] = {}
        self.mean_s = 0.0
        """0 before the first request."""

    def add(self, num_prompt_tokens: int, decode_steps: float, service: ModelService) -> None:
        """Adds a request to the mean."""
        self._count += 1
        rate = max(1 / self._count, _MIN_RATE)
        for recent in self._models.values():
            recent.decay(1 - rate)
        model = self._models.setdefault(service.model, _RecentRequests())
        model.share += rate
        model.prompt_tokens += rate * num_prompt_tokens
        model.decode_steps += rate * decode_steps
        prefill_s, decode_s = _work_s(
            round(model.prompt_tokens / model.share), model.decode_steps / model.share, service
        )
        model.work_s = prefill_s + decode_s
        self.mean_s = sum(recent.share * recent.work_s for recent in self._models.values())


def _work_s(num_prompt_tokens: int, decode_steps: float, service: ModelService) -> tuple[float, float]:
    """Seconds of prefill and of decode at the present step costs."""
    costs = service.costs or UNMEASURED
    return (
        costs.prefill.prefill_s(num_prompt_tokens, chunk=service.step_token_budget),
        costs.decode.decode_s(decode_steps, num_prompt_tokens),
    )


def _decode_steps(prediction: LengthPrediction) -> float:
    """Decode steps of an output of median length: prefill computes the first token."""
    return max(0.0, prediction.p50_tokens - 1)


class ExpectedWork:
    """Owns the mean work of one unit's recent predicted requests, and the work of its unpredicted requests.

    All unpredicted requests of a model have equal work, whatever their prompts, their limits and the current step costs
    are, so they are ordered by arrival. Invariant: neither that work nor the mean beside it changes while requests of
    the model are queued.

    Of two requests with the same work relative to the mean the earlier one is first, however the mean changes: the
    longest lead, ``longest_lead`` times the mean work, decreases by at most half of the time between two arrivals.
    Otherwise a mean that decreases by a hundredth would move all later requests ahead by one mean work.
    """

    def __init__(self, longest_lead: float) -> None:
        self._longest_lead = longest_lead
        self._mean_work = _MeanWork()
        self._lead_s = 0.0
        self._lead_at_s = 0.0
        """The latest arrival, at which ``_lead_s`` applied."""
        self._equal: dict[str, _EqualWork] = {}

    def expect(
        self,
        scheduling: SchedulingState,
        output: ExpectedOutput,
        num_prompt_tokens: int,
        service: ModelService,
        num_queued: int,
    ) -> ExpectedRequest:
        """``scheduling`` with the request's expected work. ``num_queued``: queued requests of its model.

        The work is that of the median length: the sum of normalized latencies is minimal in the order of E[n] / E[1/n]
        (Smith, 1956), which for a log-normal length n is the square of its median. A penalty for long tails made both
        normalized and mean latency worse.
        """
        if output.source in UNPREDICTED:
            return self._equal_work(scheduling, output.unclipped, service, num_queued)
        decode_steps = _decode_steps(output.prediction)
        prefill_s, decode_s = _work_s(num_prompt_tokens, decode_steps, service)
        self._mean_work.add(num_prompt_tokens, decode_steps, service)
        mean_work_s = self._mean_work.mean_s
        scheduling = replace(
            scheduling,
            prefill_s=prefill_s,
            decode_s=decode_s,
            mean_work_s=mean_work_s,
            queued_per_slot=num_queued / service.max_num_seqs,
            longest_lead_s=self._updated_lead_s(scheduling.arrived_at_s, mean_work_s),
        )
        return ExpectedRequest(scheduling, output.prediction)

    def _equal_work(
        self, scheduling: SchedulingState, prediction: LengthPrediction, service: ModelService, num_queued: int
    ) -> ExpectedRequest:
        kept = self._equal.get(service.model) if num_queued else None
        if kept is None:
            _, work_s = _work_s(0, _decode_steps(prediction), service)
            kept = _EqualWork(work_s, self._mean_work.mean_s or work_s, prediction)
            if service.costs is not None:
                self._equal[service.model] = kept
        scheduling = replace(
            scheduling,
            prefill_s=0.0,
            decode_s=kept.work_s,
            mean_work_s=kept.mean_work_s,
            longest_lead_s=self._updated_lead_s(scheduling.arrived_at_s, kept.mean_work_s),
        )
        return ExpectedRequest(scheduling, kept.prediction)

    def _updated_lead_s(self, arrived_at_s: float, mean_work_s: float) -> float:
        """The longest lead of a request that arrives at ``arrived_at_s`` (unix time)."""
        decrease_s = max(0.0, arrived_at_s - self._lead_at_s) / 2
        self._lead_s = max(self._longest_lead * mean_work_s, self._lead_s - decrease_s)
        self._lead_at_s = max(self._lead_at_s, arrived_at_s)
        return self._lead_s
