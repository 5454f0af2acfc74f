"""Draws one token from logits. A draw depends only on the logits, the parameters, the seed and the place.

Filters in the order of transformers and vLLM: temperature, top-k, top-p.
"""

from __future__ import annotations

import numpy as np

from muxmesh.engine.step import Draw
from muxmesh.types import Sampling

_NUCLEUS_CANDIDATES = 1024


def draw_token(logits: np.ndarray, draw: Draw) -> int:
    """The token drawn from ``logits`` (f32, [vocab_size]); changes ``logits`` where tokens are banned."""
    if draw.banned:
        logits[list(draw.banned)] = -np.inf
    if draw.sampling.greedy:
        return int(np.argmax(logits))
    token_ids, probabilities = candidates(logits, draw.sampling)
    cumulative = np.cumsum(probabilities)
    place = uniform(draw.sampling.seed, draw.output_index) * cumulative[-1]
    return int(token_ids[min(int(np.searchsorted(cumulative, place, side="right")), len(token_ids) - 1)])


def uniform(seed: int, output_index: int) -> float:
    """A number in [0, 1) that depends on (seed, output_index) alone: Philox, a counter-based generator."""
    bits = np.random.Philox(key=seed & (2**64 - 1), counter=output_index)
    return float(np.random.Generator(bits).random())


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Token ids that may be drawn, and their probabilities up to a common factor (f64, same length).

    Top-k keeps ties with the k-th; top-p keeps the smallest set of likeliest tokens that reaches ``top_p``.
    """
    scaled = logits.astype(np.float64) / sampling.temperature
    token_ids = np.arange(len(scaled))
    if 0 < sampling.top_k < len(scaled):
        threshold = np.partition(scaled, -sampling.top_k)[-sampling.top_k]
        token_ids = np.flatnonzero(scaled >= threshold)
        scaled = scaled[token_ids]
    weights = np.exp(scaled - scaled.max())
    if sampling.top_p >= 1.0:
        return token_ids, weights
    kept = _nucleus(weights, sampling.top_p)
    return token_ids[kept], weights[kept]


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Indices of the smallest set of largest weights that reaches ``top_p`` of the sum, in descending order."""
    wanted = top_p * weights.sum()
    if len(weights) > _NUCLEUS_CANDIDATES:  # sorting a few is far cheaper than sorting a vocabulary
        few = np.argpartition(weights, -_NUCLEUS_CANDIDATES)[-_NUCLEUS_CANDIDATES:]
        if weights[few].sum() >= wanted:
            nucleus: np.ndarray = few[_head(weights[few], wanted)]
            return nucleus
    return _head(weights, wanted)


def _head(weights: np.ndarray, wanted: float) -> np.ndarray:
    order = np.argsort(-weights, kind="stable")
    needed = int(np.searchsorted(np.cumsum(weights[order]), wanted, side="left")) + 1
    return order[:needed]
