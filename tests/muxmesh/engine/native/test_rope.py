"""Rotary tables against transformers and against the formulas of the papers in f64."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from muxmesh.engine.native.rope import rope_tables
from muxmesh.models.model_spec import SIM_SPEC, LinearRope, Llama3Rope, ModelSpec, YarnRope, spec_from_config

POSITIONS = 300
TOLERANCE = POSITIONS * 4e-7
"""A frequency may differ in its last bits, which adds up over the positions."""
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 64},
    "llama3 of a long context": {**LLAMA3, "original_max_position_embeddings": 8192},
    "yarn": YARN,
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn, other betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, attention factor": {**YARN, "attention_factor": 1.5},
    "yarn, two mscales": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn, ramp of no width": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
}


def spec_of(scaling: LinearRope | Llama3Rope | YarnRope | None = None, **changes: Any) -> ModelSpec:
    return replace(SIM_SPEC, rope_scaling=scaling, head_dim=64, **changes)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("rope", KINDS.values(), ids=KINDS)
def test_tables_are_those_of_transformers(rope: dict[str, Any], theta: float) -> None:
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=256,
        num_attention_heads=4,
        head_dim=64,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": theta, **rope},
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(POSITIONS)[None])
    ours = rope_tables(spec_from_config(Path("config.json"), config.to_dict(), {}), POSITIONS)
    for table, reference in zip(ours, (cos, sin), strict=True):
        assert np.abs(table - reference[0, :, :32].numpy()).max() < TOLERANCE


@pytest.mark.parametrize("head_dim", [16, 26, 128])
def test_tables_have_one_column_per_pair_of_dimensions(head_dim: int) -> None:
    for table in rope_tables(replace(SIM_SPEC, head_dim=head_dim), 7):
        assert table.shape == (7, head_dim // 2) and table.dtype == np.float32


def test_the_first_position_is_not_rotated() -> None:
    cos, sin = rope_tables(spec_of(), 1)
    assert (cos == 1.0).all() and (sin == 0.0).all()


def test_each_pair_turns_by_a_power_of_theta_per_position() -> None:
    cos, sin = rope_tables(spec_of(rope_theta=1000.0), POSITIONS)
    angles = np.outer(np.arange(POSITIONS), 1000.0 ** (-np.arange(32) / 32))
    assert np.abs(cos - np.cos(angles)).max() < TOLERANCE
    assert np.abs(sin - np.sin(angles)).max() < TOLERANCE


def test_linear_scaling_reaches_a_position_a_factor_later() -> None:
    plain, scaled = rope_tables(spec_of(), 50), rope_tables(spec_of(LinearRope(4.0)), 200)
    for table, reference in zip(scaled, plain, strict=True):
        assert np.allclose(table[::4], reference, atol=1e-6)


def frequencies(spec: ModelSpec) -> np.ndarray:
    """The angle of each pair at position 1, from tables of YaRN's factor 1."""
    cos, sin = rope_tables(spec, 2)
    angles: np.ndarray = np.arctan2(sin[1], cos[1])
    return angles


def test_llama3_scaling_keeps_short_wavelengths_and_stretches_long_ones() -> None:
    plain = frequencies(spec_of())
    stretched = frequencies(spec_of(Llama3Rope(8.0, 1.0, 4.0, 256)))
    wavelengths = 2 * math.pi / plain
    short, long = wavelengths < 256 / 4, wavelengths > 256
    assert short.any() and long.any() and (~short & ~long).any()
    assert np.allclose(stretched[short], plain[short], rtol=1e-4)
    assert np.allclose(stretched[long], plain[long] / 8, rtol=1e-4)
    between = stretched[~short & ~long] / plain[~short & ~long]
    assert ((between > 1 / 8) & (between < 1)).all()
    assert (np.diff(stretched) < 0).all()


def test_yarn_scaling_keeps_fast_pairs_and_interpolates_slow_ones() -> None:
    plain = frequencies(spec_of())
    stretched = frequencies(spec_of(YarnRope(4.0, 128, beta_fast=32, beta_slow=1, attention_factor=1.0, truncate=True)))
    turns = 128 * plain / (2 * math.pi)
    assert np.allclose(stretched[0], plain[0], rtol=1e-4)
    assert np.allclose(stretched[turns < 0.5], plain[turns < 0.5] / 4, rtol=1e-4)


def test_the_attention_factor_of_yarn_scales_both_tables() -> None:
    scaling = YarnRope(4.0, 128, beta_fast=32, beta_slow=1, attention_factor=1.0, truncate=True)
    plain = rope_tables(spec_of(scaling), 20)
    scaled = rope_tables(spec_of(replace(scaling, attention_factor=1.25)), 20)
    for table, reference in zip(scaled, plain, strict=True):
        assert np.allclose(table, 1.25 * reference, rtol=1e-6)


def test_a_longer_table_begins_with_the_shorter_one() -> None:
    spec = spec_of(LinearRope(2.0))
    for longer, shorter in zip(rope_tables(spec, 90), rope_tables(spec, 40), strict=True):
        assert np.array_equal(longer[:40], shorter)
