"""MuxServe's estimator, compared with its own values, with values by hand, and with batches raised one by one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxmesh.placement.muxserve_files import LLAMA_SIZES
from muxmesh.placement.plan import ModelLoad, PlacedModel, PlacedUnit, Plan
from muxmesh.placement.profile import MachineFacts, ModelProfile, Profile, PrototypeConstants
from muxmesh.placement.reference_estimator import ReferenceEstimator
from muxmesh.placement.step_table import StepTable, table_from_cells
from tests.support.placement import load, profile

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
PREFILL_MS = (38.727, 62.044, 118.217, 210.332, 402.645, 806.459, 1795.658, 4178.478, 4274.983, 3672.843, 4100.926)
DECODE_MS = {
    30: (25.055, 25.051, 25.064, 25.586, 26.334, 30.356, 39.698, 68.588, 120.701, 185.055, 336.442),
    90: (23.842, 23.970, 23.842, 23.707, 23.907, 24.081, 42.570, 37.290, 61.692, 118.181, 177.145),
}
"""30B on four devices in MuxServe's profile, by batch: prefills on the whole device, and decode steps by share."""


def published(kind: str, table: StepTable, num_devices: int) -> Profile:
    """A profile of one model with the sizes and costs of MuxServe's."""
    size = LLAMA_SIZES[kind]
    model = ModelProfile(
        kind, size.weights_bytes, size.kv_bytes_per_token, {num_devices: table}, prototype=size.prototype
    )
    return Profile(MachineFacts("cuda", "made up", 8, 80 * 2**30), {kind: model})


def seconds(row: Sequence[float]) -> list[list[float]]:
    """Cells of one length by batch, of milliseconds."""
    return [[one / 1000] for one in row]


LLAMA_30B = published(
    "llama-30b",
    table_from_cells(
        (30, 90, 100),
        BATCHES,
        (512,),
        [seconds(PREFILL_MS)] * 3,
        [seconds(DECODE_MS[30]), seconds(DECODE_MS[90]), seconds(DECODE_MS[90])],
    ),
    4,
)


def test_a_published_unit_has_the_throughputs_of_the_prototype() -> None:
    hot, cold = load("llm-11", 89 / 9, "llama-30b"), load("llm-8", 29.5 / 9, "llama-30b")
    estimator = ReferenceEstimator(LLAMA_30B)
    assert estimator.limits(4, [hot, cold]) == [184, 61]
    found = estimator.throughputs_of(4, [(hot, 90), (cold, 30)])
    assert found == [pytest.approx(5.897, abs=5e-4), pytest.approx(2.876, abs=5e-4)]
    mean = sum(one.rate * x for one, x in zip((hot, cold), found, strict=True)) / (hot.rate + cold.rate)
    assert mean == pytest.approx(5.144974, abs=1e-4)


def test_the_memory_of_a_unit_is_divided_by_rate_and_kv_bytes() -> None:
    # 0.98 * 80 * 4 GB less 2 * 60 GB of weights and 2 * 6 GB: 181.6 GB, and 498 tokens of KV are 0.7409 GB.
    loads = [load("a", 3.0, "llama-30b"), load("b", 1.0, "llama-30b")]
    assert ReferenceEstimator(LLAMA_30B).limits(4, loads) == [183, 61]
    assert ReferenceEstimator(LLAMA_30B).limits(1, loads) == [0, 0]


def test_a_unit_whose_memory_holds_one_sequence_of_each_model_has_no_throughput() -> None:
    cells = [seconds((1.0, 2.0))]
    estimator = ReferenceEstimator(published("llama-30b", table_from_cells((100,), (1, 2), (512,), cells, cells), 1))
    assert estimator.throughputs_of(1, [(load("a", 1.0, "llama-30b"), 100)] * 2) == [0.0, 0.0]


def small(table: StepTable, prototype: PrototypeConstants | None = None) -> ReferenceEstimator:
    """The estimator of one model on one device."""
    models = {"small": ModelProfile("small", 1, 2**20, {1: table}, prototype=prototype)}
    return ReferenceEstimator(Profile(MachineFacts("cuda", "made up", 1, 1), models))


def test_decode_is_the_mean_of_running_means_and_prefill_the_first_length_above_the_prompt() -> None:
    table = table_from_cells(
        (50, 100),
        (1, 2),
        (128, 256, 512, 1024),
        [[[9.0] * 4] * 2, [[1, 2, 3, 4]] * 2],
        [[[0.01, 0.02, 0.06, 9]] * 2] * 2,
    )
    # Running means of 10, 20 and 60 ms: 10, 15 and 30. The batch stays at 1, since a state with 2, the limit, is none.
    assert small(table).throughputs_of(1, [(load("a", 1.0), 50)]) == [pytest.approx(1 / (2 + 337 * 0.055 / 3))]


def test_a_missing_prefill_is_that_of_the_longest_shorter_prompt() -> None:
    table = table_from_cells((100,), (1, 2), (64, 128, 256), [[[1, 2, -1]] * 2], [[[0.01] * 3] * 2])
    assert small(table).throughputs_of(1, [(load("a", 1.0), 100)]) == [pytest.approx(1 / (2 + 337 * 0.01))]


def test_the_overhead_of_a_step_grows_with_the_batch_and_not_with_its_profiled_batch() -> None:
    table = table_from_cells((100,), (1, 64), (512,), [[[1.0]] * 2], [[[0.01]] * 2])
    found = small(table, PrototypeConstants(1.0, 0.001, 100)).throughputs_of(1, [(load("a", 1e9), 100)])
    # 71.4 GB hold more than 64 sequences of 498 MiB, so the last state that counts is a batch of 63.
    assert found == [pytest.approx(63 / (1 + 337 * (0.01 + 0.063)))]


PROFILE = profile()
ESTIMATOR = ReferenceEstimator(PROFILE, prompt_tokens=200, output_tokens=100)


def test_throughput_is_not_limited_by_the_rate() -> None:
    # Batch 1 takes 0.0256 + 0.11 s: 7.37 requests per second, within 0.5 of the higher rate.
    assert ESTIMATOR.throughputs_of(1, [(load("a", 7.8), 90)]) == [pytest.approx(1 / 0.1356)]
    assert ESTIMATOR.throughputs_of(1, [(load("a", 0.1), 90)]) == [pytest.approx(1 / 0.1356)]


def test_prefills_of_a_unit_add_up_and_decodes_do_not() -> None:
    found = ESTIMATOR.throughputs_of(1, [(load("a", 1000.0), 90), (load("b", 1000.0), 30)])
    assert found == [pytest.approx(7 / (2 * 0.2048 + 0.18)), pytest.approx(8 / (2 * 0.2048 + 0.54))]


def test_the_score_is_weighted_by_rate_and_ignores_max_num_seqs() -> None:
    def plan(cap: int) -> Plan:
        units = [
            PlacedUnit(1, (PlacedModel(load(name, rate), 90, 90, cap),)) for name, rate in (("a", 7.8), ("b", 1e3))
        ]
        return Plan(tuple(units))

    assert ESTIMATOR.score(plan(1)) == pytest.approx((7.8 / 0.1356 + 1000 * 7 / 0.3848) / 1007.8)
    assert ESTIMATOR.score(plan(1)) == ESTIMATOR.score(plan(100))


def test_a_unit_without_a_profile_has_no_throughput() -> None:
    assert ESTIMATOR.throughputs_of(4, [(load("a", 1.0), 90)]) == [0.0]
    assert ESTIMATOR.throughputs_of(1, [(load("a", 1.0), 80)]) == [0.0]


def test_no_memory_limit_holds_for_models_of_other_profiles() -> None:
    assert ESTIMATOR.limits(1, [load("a", 1.0), load("b", 1.0)]) == [None, None]


def one_by_one(made_up: Profile, num_devices: int, models: Sequence[tuple[ModelLoad, int]]) -> float:
    """The rate-weighted mean of the best state, by the procedure as it is described: +1 to the model worst off."""
    memory = ReferenceEstimator(made_up).limits(num_devices, [one for one, _ in models])
    tables = [made_up.models[one.kind].tables[num_devices] for one, _ in models]
    limits = [min(BATCHES[-1], one or 0) for one in memory]

    def step_s(model: int, batch: float) -> tuple[float, float]:
        index = next(index for index, size in enumerate(BATCHES) if size >= batch)
        table = tables[model]
        share = table.shares.index(models[model][1])
        costs = made_up.models[models[model][0].kind].prototype
        assert costs is not None
        return float(table.prefill[-1, index, 0]), float(
            table.decode[share, index, 0]
        ) + costs.sequence_overhead_s * batch

    sizes = []
    for model, (one, _) in enumerate(models):
        low, high, middle = 1.0, float(max(2, limits[model])), 1.0
        while high - low >= 1:
            middle = (low + high) / 2
            prefill_s, decode_s = step_s(model, middle)
            if middle / (337 * decode_s + prefill_s) >= one.rate:
                high = middle
            else:
                low = middle
        sizes.append(int(middle))
    best = 0.0
    while any(size < limit for size, limit in zip(sizes, limits, strict=True)):
        steps = [step_s(model, size) for model, size in enumerate(sizes)]
        prefill_s = sum(one for one, _ in steps)
        found = [size / (337 * decode_s + prefill_s) for size, (_, decode_s) in zip(sizes, steps, strict=True)]
        rates = [one.rate for one, _ in models]
        best = max(best, sum(x * rate for x, rate in zip(found, rates, strict=True)) / sum(rates))
        behind = [
            model
            for model, (x, rate) in enumerate(zip(found, rates, strict=True))
            if x + min(0.5, 0.1 * x) < rate and sizes[model] < limits[model]
        ]
        if not behind:
            break
        sizes[min(behind, key=lambda model: found[model] / rates[model])] += 1
    return best


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0.05, 60), st.sampled_from([30, 90])), min_size=1, max_size=4))
def test_batches_that_grow_in_runs_end_where_they_do_one_by_one(models: list[tuple[float, int]]) -> None:
    placed = [(load(str(index), rate, "llama-30b"), share) for index, (rate, share) in enumerate(models)]
    found = ReferenceEstimator(LLAMA_30B).throughputs_of(4, placed)
    mean = sum(one.rate * x for (one, _), x in zip(placed, found, strict=True)) / sum(one.rate for one, _ in placed)
    assert mean == pytest.approx(one_by_one(LLAMA_30B, 4, placed), rel=1e-12)
