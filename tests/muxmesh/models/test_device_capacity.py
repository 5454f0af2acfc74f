from dataclasses import replace
from typing import Any

import pytest

from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import MeshConfig
from muxmesh.config.section import Location
from muxmesh.cuda.driver import DeviceInfo
from muxmesh.models.device_capacity import (
    MAX_LOGIT_ROWS,
    WORKER_RESERVE_BYTES,
    gpu_problems,
    with_green_contexts,
    worker_bytes,
)
from muxmesh.models.model_spec import SIM_SPEC, ModelSpec
from muxmesh.models.weight_image import image_bytes

GIB = 1 << 30


def device(index: int = 0, total_bytes: int = 8 * GIB, **changed: Any) -> DeviceInfo:
    facts: dict[str, Any] = {"name": "Test GPU", "num_sms": 8, "compute_capability": (9, 0), "uuid": "GPU-0"} | changed
    return DeviceInfo(
        index=index, total_bytes=total_bytes, has_vmm=True, has_posix_fd=True, is_mps_client=False, **facts
    )


def unit(name: str = "u", index: int = 0, num_models: int = 1, **settings: Any) -> dict[str, Any]:
    models = [{"name": f"{name}{number}", "dtype": "bfloat16"} for number in range(num_models)]
    return {"name": name, "device": f"cuda:{index}", "kv_pool": "1GiB", "models": models, **settings}


def problems(
    *units: dict[str, Any], devices: list[DeviceInfo], spec: ModelSpec | None = SIM_SPEC
) -> dict[Location, str]:
    config = MeshConfig.model_validate({"units": list(units)})
    return dict(gpu_problems(config, {one.index: one for one in devices}, lambda model: spec))


def test_a_gpu_that_is_not_there_is_named_with_those_that_are() -> None:
    found = problems(unit(index=3), devices=[device(0), device(1, name="Other")])
    expected = "is not on this machine, or CUDA_VISIBLE_DEVICES hides it; visible GPUs: "
    assert found == {("units", 0, "device"): f"cuda:3 {expected}cuda:0 (Test GPU), cuda:1 (Other)"}
    assert problems(unit(), devices=[]) == {("units", 0, "device"): f"cuda:0 {expected}none"}


@pytest.mark.parametrize(("capability", "refused"), [((7, 5), True), ((8, 0), False), ((12, 0), False)])
def test_a_gpu_that_the_kernels_are_not_compiled_for_is_refused(capability: tuple[int, int], refused: bool) -> None:
    found = problems(unit(), devices=[device(compute_capability=capability)])
    expected = "cuda:0 (Test GPU) has compute capability 7.5; 8.0 or higher is needed"
    assert found == ({("units", 0, "device"): expected} if refused else {})


@pytest.mark.parametrize(("capability", "refused"), [((8, 9), True), ((9, 0), False)])
def test_green_contexts_need_a_newer_gpu_than_the_kernels(capability: tuple[int, int], refused: bool) -> None:
    found = problems(unit(green_contexts=True), devices=[device(compute_capability=capability)])
    expected = "cuda:0 (Test GPU) has compute capability 8.9; 9.0 or higher is needed"
    assert found == ({("units", 0, "green_contexts"): expected} if refused else {})


@pytest.mark.parametrize(
    ("capability", "has_mps", "settings", "expected"),
    [
        ((9, 0), True, {}, True),
        ((12, 0), True, {"mps": "on"}, True),
        ((8, 9), True, {}, False),
        ((9, 0), False, {}, False),
        ((9, 0), True, {"mps": "off"}, False),
        ((9, 0), True, {"green_contexts": False}, False),
        ((9, 0), False, {"green_contexts": True}, True),
    ],
)
def test_clients_of_mps_are_limited_by_green_contexts_where_percentages_make_products_wrong(
    capability: tuple[int, int], has_mps: bool, settings: dict[str, Any], expected: bool
) -> None:
    config = MeshConfig.model_validate({"units": [unit(**settings)]})
    decided = with_green_contexts(config, {0: device(compute_capability=capability)}, has_mps)
    assert decided.units[0].green_contexts is expected
    assert decided.units[0].limits_by_green_contexts is expected


def test_what_no_gpu_of_this_machine_decides_stays_open() -> None:
    units = [{"name": "a", "models": [{"name": "a"}]}, unit("b", index=3)]
    config = MeshConfig.model_validate({"units": units})
    decided = with_green_contexts(config, {0: device()}, has_mps=True)
    assert decided == config
    assert not any(one.limits_by_green_contexts for one in decided.units)


def test_an_instance_of_a_gpu_in_mig_mode_is_refused() -> None:
    found = problems(unit(), devices=[device(name="NVIDIA A100-SXM4-40GB MIG 1g.5gb")])
    expected = "cuda:0 (NVIDIA A100-SXM4-40GB MIG 1g.5gb) is an instance of a GPU in MIG mode; use a whole GPU"
    assert found == {("units", 0, "device"): expected}


@pytest.mark.parametrize(("missing_bytes", "refused"), [(0, False), (1, True)])
def test_pool_weights_and_workers_have_to_fit_into_the_memory_of_the_gpu(missing_bytes: int, refused: bool) -> None:
    needed = GIB + 2 * (image_bytes(SIM_SPEC, "bfloat16") + 2 * WORKER_RESERVE_BYTES)
    found = problems(unit(num_models=2), devices=[device(total_bytes=needed - missing_bytes)])
    assert found.keys() == ({("units", 0, "kv_pool")} if refused else set())
    for problem in found.values():
        assert problem.startswith("kv_pool is 1.0GiB, weights are ") and problem.count("\n") == 0
        assert "and 4 workers need 3.0GiB besides: together 4.0GiB; cuda:0 (Test GPU) has 4.0GiB" in problem


def test_units_of_one_gpu_share_its_memory_and_those_of_others_do_not() -> None:
    there = [device(0, 4 * GIB), device(1, 4 * GIB)]
    assert problems(unit("a"), unit("b", index=1), devices=there) == {}
    found = problems(unit("a"), unit("b"), devices=there)
    assert found.keys() == {("units", 1, "kv_pool")}
    assert "and earlier units of this GPU 2.5GiB: together 5.0GiB" in found["units", 1, "kv_pool"]


def test_weights_in_half_precision_need_half_the_memory() -> None:
    sizes = [image_bytes(SIM_SPEC, dtype) for dtype in ("float32", "float16", "bfloat16")]
    assert sizes[1] == sizes[2] and 0.5 * sizes[0] <= sizes[1] < 0.8 * sizes[0]


def test_a_model_that_is_not_downloaded_yet_counts_without_its_weights() -> None:
    needed = GIB + 2 * WORKER_RESERVE_BYTES
    assert problems(unit(), devices=[device(total_bytes=needed)], spec=None) == {}
    assert problems(unit(), devices=[device(total_bytes=needed)]) != {}


def test_units_on_cpus_need_no_gpu() -> None:
    models = [ModelConfig(name="m").model_dump(include={"name"})]
    assert problems({"models": models}, devices=[]) == {}


LARGE = replace(
    SIM_SPEC, vocab_size=150_000, hidden_size=4096, intermediate_size=14_000, head_dim=128, context_len=8192
)


def test_a_small_model_has_the_least_reserve() -> None:
    for spec in (SIM_SPEC, None):
        assert worker_bytes(ModelConfig(name="m", max_num_seqs=64), spec) == WORKER_RESERVE_BYTES


@pytest.mark.parametrize(
    ("changed", "more_bytes"),
    [
        # Of each further sequence: f32 logits, the product in 2 bytes, what penalties take, and its row of a step.
        ({"max_num_seqs": 300}, 100 * (150_000 * (4 + 2 + 16) + (2 * 4096 + 3 * 14_000) * 2)),
        ({"dtype": "float32"}, (200 + MAX_LOGIT_ROWS) * 150_000 * 2 + (2000 + 200) * (2 * 4096 + 3 * 14_000) * 2),
        ({"prefill_token_budget": 3000}, 1000 * (2 * 4096 + 3 * 14_000) * 2),
        ({"max_model_len": 4096}, -4096 * 128 * 4),
    ],
)
def test_a_worker_needs_memory_for_its_largest_batch(changed: dict[str, Any], more_bytes: int) -> None:
    settings: dict[str, Any] = {"dtype": "bfloat16", "max_num_seqs": 200, "prefill_token_budget": 2000}
    base, other = (worker_bytes(ModelConfig(name="m", **settings | some), LARGE) for some in ({}, changed))
    assert base > WORKER_RESERVE_BYTES and other - base == more_bytes


def test_the_memory_of_large_batches_counts_for_each_worker_of_a_unit() -> None:
    of_model = {"name": "m", "dtype": "bfloat16", "max_num_seqs": 512}
    needed = GIB + image_bytes(LARGE, "bfloat16") + 2 * worker_bytes(ModelConfig.model_validate(of_model), LARGE)
    for missing_bytes in (0, 1):
        found = problems(unit(models=[of_model]), devices=[device(total_bytes=needed - missing_bytes)], spec=LARGE)
        assert len(found) == missing_bytes
