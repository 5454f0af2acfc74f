"""From an expected length to work in seconds: what the mesh's order goes by. Pure."""

from __future__ import annotations

from dataclasses import replace

from muxmesh.cost import UNMEASURED, ModelCosts
from muxmesh.running import RunningMean
from muxmesh.types import LengthPrediction, Standing, Stopping

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


def typical_work() -> RunningMean:
    """The work of a request on one unit, in seconds: the last few hundred count."""
    return RunningMean(least_rate=1 / 500)


def with_work(
    standing: Standing,
    prediction: LengthPrediction,
    num_prompt_tokens: int,
    costs: ModelCosts | None,
    chunk: int,
    typical: RunningMean,
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
    return replace(standing, prefill_s=prefill_s, decode_s=decode_s, typical_s=typical.mean)


def expected_work(
    standing: Standing,
    said: LengthPrediction,
    source: str,
    stopping: Stopping,
    num_prompt_tokens: int,
    costs: ModelCosts | None,
    chunk: int,
    typical: RunningMean,
) -> tuple[LengthPrediction, Standing]:
    """What is expected of a request within its own limits, and its standing with the work that comes to.

    ``source``: see `Forecast`; where it tells nothing of the request, its limits are no work less either.
    """
    limited, guessed = within(said, stopping), source not in EQUAL_FOR_ALL
    counted = limited if guessed else said
    return limited, with_work(standing, counted, num_prompt_tokens, costs, chunk, typical, guessed)
