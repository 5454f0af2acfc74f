"""Expected work of requests in seconds, by which they are ordered, from predicted output lengths. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from muxmesh.running_mean import RunningMean
from muxmesh.step_cost import UNMEASURED, ModelCosts
from muxmesh.types import UNPREDICTED, LengthPrediction, SchedulingState, Stopping

_MEAN_STEP = 1.25
"""The mean work in use is replaced once the running mean is this factor above or below it."""


def fixed_length(stopping: Stopping, has_stop_strings: bool) -> int | None:
    """The output length in tokens if the request itself fixes it, else None."""
    never_stops = not (stopping.eos_token_ids or stopping.stop_token_ids or has_stop_strings)
    if never_stops or (stopping.min_new_tokens == stopping.max_new_tokens and not has_stop_strings):
        return stopping.max_new_tokens
    return None


@dataclass(frozen=True, slots=True)
class ModelService:
    """How a unit serves a model. ``costs`` is None before its first step; ``step_token_budget``: tokens in a step."""

    model: str
    costs: ModelCosts | None
    step_token_budget: int


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
    """The work that all unpredicted requests of a model share, and the mean work beside it. Both affect the order.

    ``prediction``: the length of which ``work_s`` is the work.
    """

    work_s: float
    mean_work_s: float
    prediction: LengthPrediction


class ExpectedWork:
    """Owns the running mean of the work of one unit's requests, and the work of its unpredicted requests.

    All unpredicted requests of a model have equal work, whatever their prompts, their limits and the current step costs
    are, so they are ordered by arrival. Invariant: neither that work nor the mean beside it changes while requests of
    the model are queued.
    """

    def __init__(self) -> None:
        self._mean = RunningMean(min_rate=1 / 500)
        self._mean_work_s = 0.0
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
        costs = service.costs or UNMEASURED
        prefill_s = costs.prefill.prefill_s(num_prompt_tokens, chunk=service.step_token_budget)
        decode_s = costs.decode.decode_s(max(0.0, output.prediction.p50_tokens - 1), num_prompt_tokens)
        mean_work_s = self._add(prefill_s + decode_s)
        scheduling = replace(scheduling, prefill_s=prefill_s, decode_s=decode_s, mean_work_s=mean_work_s)
        return ExpectedRequest(scheduling, output.prediction)

    def _equal_work(
        self, scheduling: SchedulingState, prediction: LengthPrediction, service: ModelService, num_queued: int
    ) -> ExpectedRequest:
        kept = self._equal.get(service.model) if num_queued else None
        if kept is not None:
            self._add(kept.work_s)
        else:
            work_s = (service.costs or UNMEASURED).decode.decode_s(max(0.0, prediction.p50_tokens - 1), 0)
            kept = _EqualWork(work_s, self._add(work_s), prediction)
            if service.costs is not None:
                self._equal[service.model] = kept
        scheduling = replace(scheduling, prefill_s=0.0, decode_s=kept.work_s, mean_work_s=kept.mean_work_s)
        return ExpectedRequest(scheduling, kept.prediction)

    def _add(self, work_s: float) -> float:
        """Adds the work of one request to the running mean; returns the mean work in use.

        A request's handicap is proportional to the mean work, so two requests compare fairly only under the same mean.
        The mean in use therefore changes seldom, and in steps.
        """
        self._mean.add(work_s)
        if not self._mean_work_s / _MEAN_STEP <= self._mean.mean <= self._mean_work_s * _MEAN_STEP:
            self._mean_work_s = self._mean.mean
        return self._mean_work_s
