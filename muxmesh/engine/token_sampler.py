"""Samples one token from logits on the host. The token depends only on the logits, the parameters, seed and index.

The steps are in the order of transformers and vLLM: bias and allowed tokens, penalties, temperature, top-k, top-p,
min-p. Log-probabilities are the model's own, before all of these.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from muxmesh.engine.step import SampledToken, SampleSpec
from muxmesh.errors import SequenceFailed
from muxmesh.types import Candidate, Sampling, TokenLogprobs

_SPAN = 256
"""Length of the spans that `_index_at` searches first."""
_LIKELY_FRACTION = np.float32(1e-4)
"""Tokens with less than this fraction of the highest probability are nearly always outside of top-k and top-p.

Few tokens of a vocabulary have more, so top-k and top-p are searched among those first.
"""
_MAX_LOGIT = np.finfo(np.float32).max


def sample_token(logits: np.ndarray, spec: SampleSpec) -> SampledToken:
    """Samples a token from ``logits`` (f32, [vocab_size]), which stay unchanged. Their maximum is finite.

    Raises SequenceFailed if the request bans, or the model excludes, every token.
    """
    sampling = spec.sampling
    changed = adjusted(logits, spec)
    if changed is not logits and not np.isfinite(changed.max()):
        raise SequenceFailed(nothing_to_sample(spec.output_index))
    token_id = _sample(changed, spec)
    num_candidates = sampling.logprobs
    return SampledToken(token_id, None if num_candidates is None else token_logprobs(logits, token_id, num_candidates))


def nothing_to_sample(output_index: int) -> str:
    """The message of the error if the request bans, or the model excludes, every token."""
    return f"no token may be sampled at output index {output_index}: every logit is -inf"


def _sample(logits: np.ndarray, spec: SampleSpec) -> int:
    sampling = spec.sampling
    if sampling.greedy:
        return int(np.argmax(logits))
    token_ids, weights = candidates(logits, sampling)
    index = _index_at(weights, uniform(sampling.seed, spec.sequence_index, spec.output_index))
    return index if token_ids is None else int(token_ids[index])


def _index_at(weights: np.ndarray, fraction: float) -> int:
    """The first index at which the running sum of ``weights`` exceeds ``fraction`` of the total.

    Searches the sums of spans first, then within one span: faster than one running sum over a vocabulary.
    """
    ends = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _SPAN), dtype=np.float64))
    target = fraction * ends[-1]
    span = _first_above(ends, target)
    first = span * _SPAN
    within = np.cumsum(weights[first : first + _SPAN], dtype=np.float64)
    return first + _first_above(within, target - (ends[span - 1] if span else 0.0))


def _first_above(sums: np.ndarray, target: float) -> int:
    """The first index of a running sum above ``target``; where rounding leaves none, the last that adds to the sum.

    So an item of weight 0 is never found: a banned token has that weight.
    """
    return min(int(np.searchsorted(sums, target, side="right")), int(np.searchsorted(sums, sums[-1])))


def uniform(seed: int, sequence_index: int, output_index: int) -> float:
    """Returns a number in [0, 1) that depends on the arguments alone.

    The generator is Philox, a counter-based one (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3").
    """
    bits = np.random.Philox(key=(seed & (2**64 - 1)) | sequence_index << 64, counter=output_index)
    return float(np.random.Generator(bits).random())


def adjusted(logits: np.ndarray, spec: SampleSpec) -> np.ndarray:
    """Returns the logits after bias, allowed and banned tokens, and penalties; ``logits`` itself if none applies."""
    sampling = spec.sampling
    unrestricted = not spec.banned and sampling.allowed_token_ids is None and spec.token_bitmask is None
    if unrestricted and not sampling.logit_bias and not sampling.has_penalties:
        return logits
    changed = logits.copy()
    for token_id, bias in sampling.logit_bias:
        changed[token_id] += np.float32(bias)
    if spec.banned:
        changed[list(spec.banned)] = -np.inf
    if sampling.allowed_token_ids is not None:
        allowed = np.full(len(changed), -np.inf, dtype=np.float32)
        kept = list(sampling.allowed_token_ids)
        allowed[kept] = changed[kept]
        changed = allowed
    if spec.token_bitmask is not None:
        bits = np.unpackbits(spec.token_bitmask.view(np.uint8), count=len(changed), bitorder="little")
        changed[bits == 0] = -np.inf
    if sampling.has_penalties:
        _penalize(changed, spec)
    return changed


def _penalize(logits: np.ndarray, spec: SampleSpec) -> None:
    """Applies the penalties: repetition (CTRL, Keskar et al., 2019) to prompt and output, the others to the output."""
    sampling = spec.sampling
    if sampling.repetition_penalty != 1.0:
        seen = np.unique(np.array([*spec.prompt_token_ids, *spec.output_token_ids], dtype=np.int64))
        values = logits[seen]
        factor = np.float32(sampling.repetition_penalty)
        with np.errstate(over="ignore"):
            penalized = np.where(values > 0, values / factor, values * factor)
        # A tiny factor overflows. What is -inf stays so: a banned token.
        logits[seen] = np.minimum(penalized, _MAX_LOGIT)
    if spec.output_token_ids:
        token_ids, counts = np.unique(np.array(spec.output_token_ids, dtype=np.int64), return_counts=True)
        logits[token_ids] -= np.float32(sampling.frequency_penalty) * counts.astype(np.float32)
        logits[token_ids] -= np.float32(sampling.presence_penalty)


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray | None, np.ndarray]:
    """Returns the token ids that may be sampled (None: all), and their probabilities up to a common factor.

    Top-k keeps ties with the k-th token. Top-p keeps the smallest set of most likely tokens whose probabilities sum to
    at least ``top_p``. Min-p keeps tokens with at least ``min_p`` of the highest probability.
    """
    token_ids = None
    if 0 < sampling.top_k < len(logits):
        token_ids = np.flatnonzero(logits >= _kth_largest(logits, sampling.top_k))
        logits = logits[token_ids]
    with np.errstate(over="ignore"):  # what is too far below the maximum for f32 has weight 0
        weights = np.exp((logits - logits.max()) * np.float32(1.0 / sampling.temperature))
    for keep, threshold, off in ((_nucleus, sampling.top_p, 1.0), (_likely, sampling.min_p, 0.0)):
        if threshold != off:
            kept = keep(weights, threshold)
            token_ids = kept if token_ids is None else token_ids[kept]
            weights = weights[kept]
    return token_ids, weights


def _kth_largest(logits: np.ndarray, k: int) -> np.float32:
    few = logits[logits >= logits.max() + np.log(_LIKELY_FRACTION)]
    chosen: np.float32 = np.partition(few if len(few) >= k else logits, -k)[-k]
    return chosen


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Indices of the smallest set of largest weights that reaches ``top_p`` of the sum. Of equals, keeps the first."""
    wanted = top_p * float(weights.sum(dtype=np.float64))
    likely = np.flatnonzero(weights >= _LIKELY_FRACTION * weights.max())
    if weights[likely].sum(dtype=np.float64) < wanted:
        likely = np.arange(len(weights))
    few = weights[likely]
    descending = np.sort(few)[::-1]
    reached = np.searchsorted(np.cumsum(descending, dtype=np.float64), wanted, side="left")
    needed = min(int(reached) + 1, len(few))
    least = descending[needed - 1]
    above, equal = np.flatnonzero(few > least), np.flatnonzero(few == least)
    nucleus: np.ndarray = likely[np.sort(np.concatenate([above, equal[: needed - len(above)]]))]
    return nucleus


def _likely(weights: np.ndarray, min_p: float) -> np.ndarray:
    """Indices of the weights that reach ``min_p`` of the largest."""
    return np.flatnonzero(weights >= np.float32(min_p) * weights.max())


def token_logprobs(logits: np.ndarray, token_id: int, num_candidates: int) -> TokenLogprobs:
    """Returns the log-probabilities of ``token_id`` and of the ``num_candidates`` most likely tokens."""
    top = float(logits.max())
    log_sum = top + float(np.log(np.exp(logits.astype(np.float64) - top).sum()))
    rank = int((logits > logits[token_id]).sum()) + 1
    return TokenLogprobs(
        Candidate(token_id, float(logits[token_id]) - log_sum, rank),
        tuple(
            Candidate(int(likely), float(logits[likely]) - log_sum, index + 1)
            for index, likely in enumerate(_most_likely(logits, num_candidates))
        ),
    )


def _most_likely(logits: np.ndarray, count: int) -> Sequence[int]:
    """Ids of the ``count`` largest logits in descending order; of equals, the smaller id first."""
    if count == 0:
        return ()
    count = min(count, len(logits))
    least = np.partition(logits, -count)[-count]
    above = np.flatnonzero(logits > least)
    few = np.concatenate([above, np.flatnonzero(logits == least)[: count - len(above)]])
    ordered: Sequence[int] = few[np.argsort(-logits[few], kind="stable")].tolist()
    return ordered
