"""Tables of rotary position embeddings, with linear, Llama 3 and YaRN scaling. Pure arithmetic on the spec."""

from __future__ import annotations

import math

import numpy as np

from muxmesh.models.model_spec import LinearRope, Llama3Rope, ModelSpec, YarnRope


def rope_tables(spec: ModelSpec, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns cos and sin of each position and pair, each f32 [num_positions, head_dim / 2].

    The source is RoFormer (Su et al., 2021). YaRN's attention factor is multiplied into both tables.
    """
    frequencies, factor = _frequencies(spec)
    angles = np.outer(np.arange(num_positions, dtype=np.float32), frequencies)
    scale = np.float32(factor)
    return np.cos(angles) * scale, np.sin(angles) * scale


def _frequencies(spec: ModelSpec) -> tuple[np.ndarray, float]:
    """Returns the angle per position of each pair, f32 [head_dim / 2], and the factor of cos and sin."""
    exponents = np.arange(0, spec.head_dim, 2, dtype=np.float32) / np.float32(spec.head_dim)
    plain = np.float32(1.0) / np.float32(spec.rope_theta) ** exponents
    scaling = spec.rope_scaling
    if isinstance(scaling, LinearRope):
        return plain / np.float32(scaling.factor), 1.0
    if isinstance(scaling, Llama3Rope):
        return _llama3(plain, scaling), 1.0
    if isinstance(scaling, YarnRope):
        return _yarn(plain, spec, scaling)
    return plain, 1.0


def _llama3(plain: np.ndarray, scaling: Llama3Rope) -> np.ndarray:
    """Stretches long wavelengths, keeps short ones and interpolates between them (rule of the Llama 3.1 release)."""
    original = scaling.original_context_len
    wavelengths = 2 * np.pi / plain
    longest, shortest = original / scaling.low_freq_factor, original / scaling.high_freq_factor
    smooth = (original / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - smooth) * plain / scaling.factor + smooth * plain
    stretched = np.where(
        wavelengths > longest, plain / scaling.factor, np.where(wavelengths < shortest, plain, between)
    )
    return stretched.astype(np.float32)


def _yarn(plain: np.ndarray, spec: ModelSpec, scaling: YarnRope) -> tuple[np.ndarray, float]:
    """NTK-by-parts frequencies and attention factor of YaRN (Peng et al., 2023, sections 3.2 and 3.4)."""

    def pair_with_turns(turns: float) -> float:
        """Fractional index of the pair that makes ``turns`` full turns within the original context."""
        length = scaling.original_context_len / (turns * 2 * math.pi)
        return spec.head_dim * math.log(length) / (2 * math.log(spec.rope_theta))

    low, high = pair_with_turns(scaling.beta_fast), pair_with_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.head_dim - 1)
    if low == high:
        high += 0.001  # a ramp of width 0 would divide by 0; transformers and vLLM add the same
    pairs = np.arange(spec.head_dim // 2, dtype=np.float32)
    kept = 1 - np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)
    frequencies = plain / scaling.factor * (1 - kept) + plain * kept
    return frequencies.astype(np.float32), scaling.attention_factor
