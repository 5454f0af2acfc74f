"""From an expected length to work in seconds: what the mesh's order goes by. Pure."""

from __future__ import annotations

from dataclasses import replace

from muxmesh.cost import UNMEASURED, ModelCosts
from muxmesh.types import EngineRequest, LengthPrediction, Standing, Stopping


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


def with_work(
    standing: Standing, prediction: LengthPrediction, num_prompt_tokens: int, costs: ModelCosts | None, chunk: int
) -> Standing:
    """The standing with the work that is expected; ``chunk``: prompt tokens in a step.

    The median orders. To minimise the sum of latencies for each token of an answer, go by E[n] / E[1/n] (Smith, 1956),
    which for a log-normal length is its median, squared. A penalty for long tails made that and the mean worse.
    """
    costs = costs or UNMEASURED
    return replace(
        standing,
        prefill_s=costs.prefill.prefill_s(num_prompt_tokens, chunk=chunk),
        decode_s=costs.decode.decode_s(max(0.0, prediction.p50_tokens - 1), num_prompt_tokens),
    )


def with_forecast(
    request: EngineRequest, prediction: LengthPrediction, costs: ModelCosts | None, chunk: int
) -> EngineRequest:
    """The request with its prediction, and the work that comes to."""
    prediction = within(prediction, request.stopping)
    standing = with_work(request.standing, prediction, len(request.prompt_token_ids), costs, chunk)
    return replace(request, prediction=prediction, standing=standing)
