"""Step times from a table that is made of known ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from muxmesh.config.schema import MeshConfig
from muxmesh.placement.measured_cells import MeasuredSettings
from muxmesh.placement.profile import MachineFacts, ModelProfile, Profile
from muxmesh.placement.step_table import StepTable, table_from_cells
from muxmesh.step_cost import StepCost, StepShape, context_of
from simulator.measured_times import MeasuredStepTimes, measured_times, profile_problems

PREFILL, DECODE = StepCost(0.01, 0.002, 1e-6), StepCost(0.02, 0.001, 2e-6)
SHARES, BATCHES, LENGTHS, BUDGET = (25, 50, 100), (1, 2, 8), (64, 300, 900), 128


def slower(share: int) -> float:
    return 1 + (100 / share - 1) / 2


def whole_prefill_s(batch: int, length: int) -> float:
    """In steps of `BUDGET` tokens, of as many prompts as fit."""
    num_steps = -(-batch * length // BUDGET)
    return num_steps * PREFILL.base_s + PREFILL.step_s(batch * length, batch * context_of(0, length)) - PREFILL.base_s


def known_table() -> StepTable:
    prefill = [[[slower(s) * whole_prefill_s(b, n) for n in LENGTHS] for b in BATCHES] for s in SHARES]
    decode = [[[slower(s) * DECODE.step_s(b, b * n) for n in LENGTHS] for b in BATCHES] for s in SHARES]
    prefill[0][2][2] = decode[1][2][2] = -1  # not measured
    return table_from_cells(SHARES, BATCHES, LENGTHS, prefill, decode)


TABLE = known_table()
TIMES = MeasuredStepTimes(TABLE, BUDGET)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("shape", [StepShape(128, context_of(0, 128), 1), StepShape(30, 6000, 4), StepShape(1, 0, 1)])
def test_a_step_of_a_prefill_has_the_cost_that_the_whole_ones_are_made_of(share: int, shape: StepShape) -> None:
    expected = slower(share) * PREFILL.step_s(shape.num_tokens, shape.num_context)
    assert TIMES.prefill_s(shape, share / 100) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("share", [25, 100])
@pytest.mark.parametrize(("num_seqs", "length"), [(1, 64), (2, 500), (5, 300), (8, 1500)])
def test_a_decode_step_is_linear_in_its_context(share: int, num_seqs: int, length: int) -> None:
    base_s, per_context_s = TIMES.decode_cost(num_seqs, share / 100)
    expected = slower(share) * DECODE.step_s(num_seqs, num_seqs * length)
    assert base_s + per_context_s * num_seqs * length == pytest.approx(expected, rel=0.01)


def test_shares_between_those_of_the_table_are_interpolated_and_smaller_ones_extrapolated() -> None:
    shape = StepShape(100, 100, 1)
    at = {share: TIMES.prefill_s(shape, share / 100) for share in (12.5, 25, 40, 50, 75, 100)}
    assert at[75] == pytest.approx((at[50] + at[100]) / 2)
    assert at[40] == pytest.approx(0.4 * at[25] + 0.6 * at[50])
    assert at[12.5] == pytest.approx(2 * at[25])


def test_a_table_whose_prefills_are_single_steps_has_their_times() -> None:
    prefill = [[[PREFILL.step_s(b * n, b * context_of(0, n)) for n in LENGTHS] for b in BATCHES]]
    times = MeasuredStepTimes(table_from_cells((100,), BATCHES, LENGTHS, prefill, prefill), None)
    assert times.prefill_s(StepShape(600, 2 * context_of(0, 300), 2), 1.0) == pytest.approx(prefill[0][1][1])


def profile(table: StepTable = TABLE, device: str = "cpu", dtype: str = "float32") -> Profile:
    settings = MeasuredSettings("native", "w", dtype, dtype, 16, BUDGET, 8, 2048)
    model = ModelProfile("small", 1000, 64, {1: table}, settings)
    return Profile(MachineFacts(device, "A device", 1, 1 << 30), {"small": model})


def config(**settings: Any) -> MeshConfig:
    models: list[Mapping[str, Any]] = [{"name": "one", "source": "small", **settings}, {"name": "two", "engine": "sim"}]
    return MeshConfig.model_validate({"units": [{"name": "u", "models": models}]})


def test_models_are_found_by_their_source_and_those_of_the_sim_engine_have_their_own_times() -> None:
    assert list(profile_problems(config(), profile())) == []
    assert set(measured_times(config(), profile())) == {("u", "one")}


def test_a_unit_on_some_cores_has_the_times_of_its_part_of_the_machine() -> None:
    machine = MachineFacts("cpu", "A CPU", 1, 1 << 30, cores=4)
    of = replace(profile(), machine=machine)
    unit = {"name": "u", "cores": [0, 1], "models": [{"name": "one", "source": "small"}]}
    times = measured_times(MeshConfig.model_validate({"units": [unit]}), of)["u", "one"]
    assert times.prefill_s(StepShape(100, 100, 1), 1.0) == TIMES.prefill_s(StepShape(100, 100, 1), 0.5)
    assert times.decode_cost(4, 0.5) == TIMES.decode_cost(4, 0.25)


EMPTY = StepTable(SHARES, BATCHES, LENGTHS, TABLE.prefill, np.full_like(TABLE.decode, np.nan))


@pytest.mark.parametrize(
    ("settings", "of", "field", "problem"),
    [
        ({"source": "large"}, profile(), "source", "large is not in the profile, which has small"),
        ({}, profile(device="cuda"), "device", "is cpu; the profile is of a cuda"),
        ({}, profile(dtype="bfloat16"), "dtype", "is float32; the profile has the times of bfloat16"),
        ({}, profile(EMPTY), "source", "small: the profile has no decode times; let `muxmesh profile` continue"),
    ],
)
def test_what_a_profile_does_not_have_is_named(settings: dict[str, Any], of: Profile, field: str, problem: str) -> None:
    ((location, found),) = profile_problems(config(**settings), of)
    assert location[-1] == field
    assert problem in found
