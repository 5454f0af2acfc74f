"""Draws one token from logits. A draw depends only on the logits, the parameters, the seed and the place.

The order is that of transformers and vLLM: bias and allowed tokens, penalties, temperature, top-k, top-p, min-p.
Log-probabilities are taken before all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from muxmesh.engine.step import Draw, Drawn
from muxmesh.types import Candidate, Sampling, TokenLogprobs

_STRETCH = 256
_LIKELY_SHARE = np.float32(1e-4)
"""Of the likeliest token's weight: few tokens of a vocabulary have so much, and nearly always they are enough."""


def draw_token(logits: np.ndarray, draw: Draw) -> Drawn:
    """The token drawn from ``logits`` (f32, [vocab_size]), which are left as they are."""
    sampling = draw.sampling
    token_id = _draw(adjusted(logits, draw), draw)
    wanted = sampling.logprobs
    return Drawn(token_id, None if wanted is None else token_logprobs(logits, token_id, wanted))


def _draw(logits: np.ndarray, draw: Draw) -> int:
    sampling = draw.sampling
    if sampling.greedy:
        return int(np.argmax(logits))
    token_ids, weights = candidates(logits, sampling)
    chosen = _chosen(weights, uniform(sampling.seed, draw.sequence, draw.output_index))
    return chosen if token_ids is None else int(token_ids[chosen])


def _chosen(weights: np.ndarray, share: float) -> int:
    """Index at which the running sum of ``weights`` passes ``share`` of the whole: first the stretch, then in it."""
    ends = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _STRETCH)), dtype=np.float64)
    place = share * ends[-1]
    stretch = min(int(np.searchsorted(ends, place, side="right")), len(ends) - 1)
    first = stretch * _STRETCH
    within = np.cumsum(weights[first : first + _STRETCH], dtype=np.float64)
    before = ends[stretch - 1] if stretch else 0.0
    return first + min(int(np.searchsorted(within, place - before, side="right")), len(within) - 1)


def uniform(seed: int, sequence: int, output_index: int) -> float:
    """A number in [0, 1) that depends on the arguments alone: Philox, a counter-based generator.

    (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3".)
    """
    bits = np.random.Philox(key=(seed & (2**64 - 1)) | sequence << 64, counter=output_index)
    return float(np.random.Generator(bits).random())


def adjusted(logits: np.ndarray, draw: Draw) -> np.ndarray:
    """The logits after bias, allowed and banned tokens, and penalties; ``logits`` itself if nothing changes them."""
    sampling = draw.sampling
    if not (draw.banned or sampling.logit_bias or sampling.allowed_token_ids is not None or sampling.looks_back):
        return logits
    changed = logits.copy()
    for token_id, bias in sampling.logit_bias:
        changed[token_id] += np.float32(bias)
    if draw.banned:
        changed[list(draw.banned)] = -np.inf
    if sampling.allowed_token_ids is not None:
        allowed = np.full(len(changed), -np.inf, dtype=np.float32)
        kept = list(sampling.allowed_token_ids)
        allowed[kept] = changed[kept]
        changed = allowed
    if sampling.looks_back:
        _penalize(changed, draw)
    return changed


def _penalize(logits: np.ndarray, draw: Draw) -> None:
    """Repetition as in CTRL (Keskar et al., 2019): over prompt and answer; the other two over the answer."""
    sampling = draw.sampling
    if sampling.repetition_penalty != 1.0:
        seen = np.unique(np.array([*draw.prompt_token_ids, *draw.output_token_ids], dtype=np.int64))
        there = logits[seen]
        factor = np.float32(sampling.repetition_penalty)
        logits[seen] = np.where(there > 0, there / factor, there * factor)
    if draw.output_token_ids:
        said, counts = np.unique(np.array(draw.output_token_ids, dtype=np.int64), return_counts=True)
        logits[said] -= np.float32(sampling.frequency_penalty) * counts.astype(np.float32)
        logits[said] -= np.float32(sampling.presence_penalty)


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray | None, np.ndarray]:
    """Token ids that may be drawn (None: all), and their probabilities up to a common factor, of the same length.

    Top-k keeps ties with the k-th; top-p keeps the smallest set of likeliest tokens that reaches ``top_p``; min-p
    keeps what has at least ``min_p`` of the likeliest one's probability.
    """
    token_ids = None
    if 0 < sampling.top_k < len(logits):
        token_ids = np.flatnonzero(logits >= _kth_largest(logits, sampling.top_k))
        logits = logits[token_ids]
    weights = np.exp((logits - logits.max()) * np.float32(1.0 / sampling.temperature))
    for keep, share, off in ((_nucleus, sampling.top_p, 1.0), (_likely, sampling.min_p, 0.0)):
        if share != off:
            kept = keep(weights, share)
            token_ids = kept if token_ids is None else token_ids[kept]
            weights = weights[kept]
    return token_ids, weights


def _kth_largest(logits: np.ndarray, k: int) -> np.float32:
    few = logits[logits >= logits.max() + np.log(_LIKELY_SHARE)]
    chosen: np.float32 = np.partition(few if len(few) >= k else logits, -k)[-k]
    return chosen


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Indices of the smallest set of largest weights that reaches ``top_p`` of the sum; the first of equals."""
    wanted = top_p * float(weights.sum(dtype=np.float64))
    likely = np.flatnonzero(weights >= _LIKELY_SHARE * weights.max())
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
    """Log-probabilities of ``token_id`` and of the ``num_candidates`` likeliest tokens under ``logits``."""
    top = float(logits.max())
    log_sum = top + float(np.log(np.exp(logits.astype(np.float64) - top).sum()))
    rank = int((logits > logits[token_id]).sum()) + 1
    return TokenLogprobs(
        Candidate(token_id, float(logits[token_id]) - log_sum, rank),
        tuple(
            Candidate(int(likely), float(logits[likely]) - log_sum, place + 1)
            for place, likely in enumerate(_likeliest(logits, num_candidates))
        ),
    )


def _likeliest(logits: np.ndarray, count: int) -> Sequence[int]:
    if count == 0:
        return ()
    count = min(count, len(logits))
    few = np.sort(np.argpartition(-logits, count - 1)[:count])
    ordered: Sequence[int] = few[np.argsort(-logits[few], kind="stable")].tolist()
    return ordered
