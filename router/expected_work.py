"""From a predicted output length to work in seconds, by which requests are ordered. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from muxmesh.running_mean import RunningMean
from muxmesh.step_cost import UNMEASURED, ModelCosts
from muxmesh.types import LengthPrediction, SchedulingState, Stopping

UNPREDICTED = frozenset({"floor", "failed", "late", "cold", "typical"})
"""Sources of predictions that say nothing of the single request: they change fast while little is known."""

_MEAN_STEP = 1.25


def fixed_length(stopping: Stopping, has_stop_strings: bool) -> int | None:
    """The output length in tokens if the request itself fixes it."""
    never_stops = not (stopping.eos_token_ids or stopping.stop_token_ids or has_stop_strings)
    if never_stops or (stopping.min_new_tokens == stopping.max_new_tokens and not has_stop_strings):
        return stopping.max_new_tokens
    return None


@dataclass(frozen=True, slots=True)
class ModelService:
    """How a unit serves a model: step costs, None before the first step, and prompt tokens in a step."""

    model: str
    costs: ModelCosts | None
    step_token_budget: int


@dataclass(frozen=True, slots=True)
class ExpectedOutput:
    """What is expected of an output before it begins: a prediction, its source (see `LengthForecast`), and the
    request's own limits.
    """

    unlimited: LengthPrediction
    source: str
    stopping: Stopping

    @property
    def prediction(self) -> LengthPrediction:
        """The prediction within the limits."""
        least, most = max(1, self.stopping.min_new_tokens), self.stopping.max_new_tokens
        return LengthPrediction(
            min(max(self.unlimited.p50_tokens, least), most), min(max(self.unlimited.p90_tokens, least), most)
        )


@dataclass(frozen=True, slots=True)
class _EqualWork:
    """The work of each unpredicted request of a model, and the mean work at that time: both decide the order."""

    work_s: float
    mean_work_s: float


class ExpectedWork:
    """Owns what is expected of the requests of one unit, in seconds of work.

    Unpredicted requests have equal work, whatever their prompts and limits are and steps cost at the moment, so their
    order is that of arrival. Invariant: while requests of a model are queued, neither that work nor the mean beside it
    changes for them.
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
    ) -> SchedulingState:
        """The scheduling state of a request with its work. ``num_queued``: requests of its model that wait.

        The median orders. To minimise the sum of normalized latencies, requests are ordered by E[n] / E[1/n] (Smith,
        1956), which for a log-normal length is its median, squared. A penalty for long tails made that and the mean
        worse.
        """
        if output.source in UNPREDICTED:
            return self._equal_work(scheduling, output.unlimited, service, num_queued)
        costs = service.costs or UNMEASURED
        prefill_s = costs.prefill.prefill_s(num_prompt_tokens, chunk=service.step_token_budget)
        decode_s = costs.decode.decode_s(max(0.0, output.prediction.p50_tokens - 1), num_prompt_tokens)
        mean_work_s = self._add(prefill_s + decode_s)
        return replace(scheduling, prefill_s=prefill_s, decode_s=decode_s, mean_work_s=mean_work_s)

    def _equal_work(
        self, scheduling: SchedulingState, prediction: LengthPrediction, service: ModelService, num_queued: int
    ) -> SchedulingState:
        kept = self._equal.get(service.model) if num_queued else None
        if kept is not None:
            self._add(kept.work_s)
        else:
            work_s = (service.costs or UNMEASURED).decode.decode_s(max(0.0, prediction.p50_tokens - 1), 0)
            kept = _EqualWork(work_s, self._add(work_s))
            if service.costs is not None:
                self._equal[service.model] = kept
        return replace(scheduling, prefill_s=0.0, decode_s=kept.work_s, mean_work_s=kept.mean_work_s)

    def _add(self, work_s: float) -> float:
        """Adds one request; returns the mean work. A request's handicap is proportional to it, so it changes in steps,
        seldom: only requests before and after a step are measured by different means.
        """
        self._mean.add(work_s)
        if not self._mean_work_s / _MEAN_STEP <= self._mean.mean <= self._mean_work_s * _MEAN_STEP:
            self._mean_work_s = self._mean.mean
        return self._mean_work_s
