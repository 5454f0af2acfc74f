"""Uniform random numbers for sampling, each keyed by (seed, sequence index, output index), many at once. Pure.

The generator is Philox4x64-10, a counter-based one (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3",
section 4): the bits are a function of key and counter. `token_sampler.uniform` computes one number by NumPy's generator
object, whose creation takes 10 us. For a batch over a run of steps on a GPU that would be longer than the steps.
"""

from __future__ import annotations

import numpy as np

_NUM_ROUNDS = 10
_MULTIPLIERS = np.array([0xD2E7470EE14C6C93, 0xCA5A826395121157], dtype=np.uint64)
_WEYL = np.array([0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B], dtype=np.uint64)
_LOW, _HALF = np.uint64(2**32 - 1), np.uint64(32)
_UNUSED_BITS = np.uint64(11)
"""A float64 has 53 bits: the highest of a word."""


def uniforms(seeds: np.ndarray, sequence_indices: np.ndarray, output_indices: np.ndarray) -> np.ndarray:
    """Returns a number in [0, 1) for each key, equal to that of `token_sampler.uniform`.

    The arguments are uint64 and broadcast together; seeds are modulo 2**64.
    """
    seeds, sequence_indices, output_indices = np.broadcast_arrays(seeds, sequence_indices, output_indices)
    key = np.stack([seeds, sequence_indices])
    # The first and the third of the counter's four words, and the second and the fourth, with one axis for the two.
    factors = np.stack([output_indices, np.zeros_like(output_indices)])
    factors[0] += np.uint64(1)  # NumPy counts up before it generates
    others = np.zeros_like(factors)
    pair = (2, *[1] * output_indices.ndim)
    multipliers, weyl = _MULTIPLIERS.reshape(pair), _WEYL.reshape(pair)
    for _ in range(_NUM_ROUNDS):
        others, factors = (
            (factors * multipliers)[::-1],
            _high_words(factors, multipliers)[::-1] ^ others ^ key,
        )
        key += weyl
    return np.asarray((factors[0] >> _UNUSED_BITS) * 2.0**-53)


def _high_words(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The upper 64 of the 128 bits of each product, by schoolbook multiplication of halves."""
    left_low, left_high = left & _LOW, left >> _HALF
    right_low, right_high = right & _LOW, right >> _HALF
    middle = left_high * right_low + (left_low * right_low >> _HALF)
    lower = left_low * right_high + (middle & _LOW)
    return np.asarray(left_high * right_high + (middle >> _HALF) + (lower >> _HALF))
