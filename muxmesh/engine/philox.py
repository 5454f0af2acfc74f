"""Uniform random numbers for sampling, each keyed by (seed, sequence index, output index), many at once. Pure.

The generator is Philox4x64-10, a counter-based one (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3",
section 4): the bits are a function of key and counter. `token_sampler.uniform` computes one number by NumPy's generator
object, whose creation takes 10 us. For a batch over a run of steps on a GPU that would be longer than the steps.
"""

from __future__ import annotations

import numpy as np

_NUM_ROUNDS = 10
_MULTIPLIERS = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_WEYL = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
_LOW, _HALF = np.uint64(2**32 - 1), np.uint64(32)
_UNUSED_BITS = np.uint64(11)
"""A float64 has 53 bits: the highest of a word."""


def uniforms(seeds: np.ndarray, sequence_indices: np.ndarray, output_indices: np.ndarray) -> np.ndarray:
    """Returns a number in [0, 1) for each key, equal to that of `token_sampler.uniform`.

    The arguments are uint64, have at least one dimension and broadcast together; seeds are modulo 2**64.
    """
    counter = output_indices + np.uint64(1)  # NumPy counts up before it generates
    words = (counter, np.zeros_like(counter), np.zeros_like(counter), np.zeros_like(counter))
    key = seeds, sequence_indices
    for _ in range(_NUM_ROUNDS):
        words = _round(words, key)
        key = key[0] + _WEYL[0], key[1] + _WEYL[1]
    return np.asarray((words[0] >> _UNUSED_BITS) * 2.0**-53)


_Words = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _round(words: _Words, key: tuple[np.ndarray, np.ndarray]) -> _Words:
    first, second, third, fourth = words
    return (
        _high_word(third, _MULTIPLIERS[1]) ^ second ^ key[0],
        third * _MULTIPLIERS[1],
        _high_word(first, _MULTIPLIERS[0]) ^ fourth ^ key[1],
        first * _MULTIPLIERS[0],
    )


def _high_word(left: np.ndarray, right: np.uint64) -> np.ndarray:
    """The upper 64 of the 128 bits of each product, by schoolbook multiplication of halves."""
    left_low, left_high = left & _LOW, left >> _HALF
    right_low, right_high = right & _LOW, right >> _HALF
    middle = left_high * right_low + (left_low * right_low >> _HALF)
    lower = left_low * right_high + (middle & _LOW)
    return np.asarray(left_high * right_high + (middle >> _HALF) + (lower >> _HALF))
