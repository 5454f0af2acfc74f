"""From an expected length to work in seconds: what the mesh's order goes by. Pure."""

from __future__ import annotations

from dataclasses import replace

from muxmesh.cost import UNMEASURED, ModelCosts
from muxmesh.types import EngineRequest, LengthPrediction, Standing, Stopping

_RATE = 1 / 500
EQUAL_FOR_ALL = frozenset({"floor", "failed", "late"})
"""Sources of predictions that tell nothing of a request."""


def fixed_length(stopping: Stopping, has_stop_strings: bool) -> int | None:
    """The answer's length if the request itself fixes it, in tokens."""
    never_ends = not (stopping.eos_token_ids or stopping.stop_token_ids or has_stop_strings)
    if never_ends or (stopping.min_new_tokens == stopping.max_new_tokens and not has_stop_strings):
        return stopping.max_new_tokens
    return None


def within(prediction: LengthPrediction, stopping: Stopping) -> LengthPrediction:
    """The prediction, as far as the request's own limits leave it."""
    least, most = max(1, stopping.min_new_tokens), stopping.max_new_tokens
    return LengthPrediction(
        min(max(prediction.p50_tokens, least), most), min(max(prediction.p90_tokens, least), most)
    )  # fmt: skip


class TypicalWork:
    """The work of a request on one unit, on average over the last few hundred, in seconds."""

    def __init__(self) -> None:
        self.mean_s = 0.0
        self._count = 0

    def add(self, work_s: float) -> None:
        """A request came."""
        self._count += 1
        self.mean_s += max(1 / self._count, _RATE) * (work_s - self.mean_s)


def with_work(
    standing: Standing,
    prediction: LengthPrediction,
    num_prompt_tokens: int,
    costs: ModelCosts | None,
    chunk: int,
    typical: TypicalWork,
    guessed: bool = True,
) -> Standing:
    """The standing with the work that is expected; ``chunk``: prompt tokens in a step.

    The median orders. To minimise the sum of latencies for each token of an answer, go by E[n] / E[1/n] (Smith, 1956),
    which for a log-normal length is its median, squared. A penalty for long tails made that and the mean worse.
    Where nothing is guessed, the prompt counts for nothing either: then all work is the same.
    """
    costs = costs or UNMEASURED
    context = num_prompt_tokens if guessed else 0
    prefill_s = costs.prefill.prefill_s(num_prompt_tokens, chunk=chunk) if guessed else 0.0
    decode_s = costs.decode.decode_s(max(0.0, prediction.p50_tokens - 1), context)
    typical.add(prefill_s + decode_s)
    return replace(standing, prefill_s=prefill_s, decode_s=decode_s, typical_s=typical.mean_s)


def with_forecast(
    request: EngineRequest,
    prediction: LengthPrediction,
    source: str,
    costs: ModelCosts | None,
    chunk: int,
    typical: TypicalWork,
) -> EngineRequest:
    """The request with its prediction, and the work that comes to. ``source``: see `Forecast`."""
    limited = within(prediction, request.stopping)
    guessed = source not in EQUAL_FOR_ALL
    counted, num_prompt_tokens = limited if guessed else prediction, len(request.prompt_token_ids)
    standing = with_work(request.standing, counted, num_prompt_tokens, costs, chunk, typical, guessed)
    return replace(request, prediction=limited, standing=standing)
