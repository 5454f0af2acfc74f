"""From an expected length to work in seconds: what the mesh's order goes by."""

from __future__ import annotations

from dataclasses import dataclass, replace

from muxmesh.cost import UNMEASURED, ModelCosts
from muxmesh.running import RunningMean
from muxmesh.types import LengthPrediction, Standing, Stopping

EQUAL_FOR_ALL = frozenset({"floor", "failed", "late", "cold", "typical"})
"""Sources of predictions that tell nothing of a request: what is typical changes fast while little is known."""

_TYPICAL_STEP = 1.25


def fixed_length(stopping: Stopping, has_stop_strings: bool) -> int | None:
    """The answer's length if the request itself fixes it, in tokens."""
    never_ends = not (stopping.eos_token_ids or stopping.stop_token_ids or has_stop_strings)
    if never_ends or (stopping.min_new_tokens == stopping.max_new_tokens and not has_stop_strings):
        return stopping.max_new_tokens
    return None


@dataclass(frozen=True, slots=True)
class Served:
    """A model as its unit serves it: what steps cost, None before that is known, and prompt tokens in a step."""

    model: str
    costs: ModelCosts | None
    chunk: int


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is known of an answer before it begins: what was said of its length, by whom (see `Forecast`), and its
    request's own limits.
    """

    said: LengthPrediction
    source: str
    stopping: Stopping

    @property
    def prediction(self) -> LengthPrediction:
        """What was said, as far as the limits leave it."""
        least, most = max(1, self.stopping.min_new_tokens), self.stopping.max_new_tokens
        return LengthPrediction(
            min(max(self.said.p50_tokens, least), most), min(max(self.said.p90_tokens, least), most)
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Equal:
    """The work of each request of a model of which nothing is guessed, and what was typical then: both order."""

    work_s: float
    typical_s: float


class UnitWork:
    """Owns what the requests of one unit are taken to be, in seconds of work, where nothing better is known of them.

    Requests of which nothing is guessed are equally much work, whatever their prompts and limits are and steps cost
    at the moment: between them the order is that of arrival. Invariant: while requests of a model wait, neither that
    work nor what is typical beside it changes for them.
    """

    def __init__(self) -> None:
        self._mean = RunningMean(least_rate=1 / 500)
        self._typical_s = 0.0
        self._equal: dict[str, _Equal] = {}

    def expect(
        self, standing: Standing, outlook: Outlook, num_prompt_tokens: int, served: Served, num_waiting: int
    ) -> Standing:
        """The standing of a request with its work. ``num_waiting``: requests of its model that wait.

        The median orders. To minimise the sum of latencies for each token of an answer, go by E[n] / E[1/n] (Smith,
        1956), which for a log-normal length is its median, squared. A penalty for long tails made that and the mean
        worse.
        """
        if outlook.source in EQUAL_FOR_ALL:
            return self._equally(standing, outlook.said, served, num_waiting)
        costs = served.costs or UNMEASURED
        prefill_s = costs.prefill.prefill_s(num_prompt_tokens, chunk=served.chunk)
        decode_s = costs.decode.decode_s(max(0.0, outlook.prediction.p50_tokens - 1), num_prompt_tokens)
        typical_s = self._take_in(prefill_s + decode_s)
        return replace(standing, prefill_s=prefill_s, decode_s=decode_s, typical_s=typical_s)

    def _equally(self, standing: Standing, said: LengthPrediction, served: Served, num_waiting: int) -> Standing:
        kept = self._equal.get(served.model) if num_waiting else None
        if kept is not None:
            self._take_in(kept.work_s)
        else:
            work_s = (served.costs or UNMEASURED).decode.decode_s(max(0.0, said.p50_tokens - 1), 0)
            kept = _Equal(work_s, self._take_in(work_s))
            if served.costs is not None:
                self._equal[served.model] = kept
        return replace(standing, prefill_s=0.0, decode_s=kept.work_s, typical_s=kept.typical_s)

    def _take_in(self, work_s: float) -> float:
        """Sees one more request; returns what is typical. The handicap of a request is so many times that, so it moves
        in steps, seldom: only those from before a step and from after it are measured by two measures.
        """
        self._mean.add(work_s)
        if not self._typical_s / _TYPICAL_STEP <= self._mean.mean <= self._typical_s * _TYPICAL_STEP:
            self._typical_s = self._mean.mean
        return self._typical_s
