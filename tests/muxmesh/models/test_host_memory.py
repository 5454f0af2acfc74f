from pathlib import Path
from typing import Any

import pytest

from muxmesh.config.schema import MeshConfig
from muxmesh.machine_limits import MemoryLimit
from muxmesh.models.host_memory import (
    KVSTORE_BYTES,
    ROUTER_BYTES,
    SIM_WORKER_BYTES,
    SLEEPING_WORKER_BYTES,
    TOKENIZER_BYTES,
    WORKER_BYTES,
    kvstore_problem,
    mesh_problems,
    pool_problems,
    worker_problem,
)

MIB = 1 << 20
FILE = Path("/sys/fs/cgroup/memory.max")
LIMIT_TEXT = "the memory limit of this container or service (cgroup, /sys/fs/cgroup/memory.max) is"


def mesh(*units: dict[str, Any]) -> MeshConfig:
    named = [{"name": f"u{index}", "cores": [index], "models": [SIM], **unit} for index, unit in enumerate(units)]
    return MeshConfig.model_validate({"units": named})


SIM = {"name": "m", "engine": "sim"}
NATIVE = {"name": "n"}
GPU = {"device": "cuda:0", "models": [NATIVE], "kv_pool": "900TiB", "kv_swap": "4MiB"}


@pytest.mark.parametrize(("missing_bytes", "is_reported"), [(0, False), (1, True)])
def test_the_pool_and_swap_of_a_unit_have_to_fit(missing_bytes: int, is_reported: bool) -> None:
    limit = MemoryLimit(1024 * MIB - missing_bytes, FILE)
    found = list(pool_problems(mesh({"kv_pool": "768MiB", "kv_swap": "256MiB"}), limit))
    problem = f"kv_pool and kv_swap are together 1.0GiB; {LIMIT_TEXT} 1024.0MiB"
    assert found == ([(("units", 0, "kv_pool"), problem)] if is_reported else [])


@pytest.mark.parametrize(("limit_mib", "is_reported"), [(192, False), (191, True)])
def test_the_pools_of_all_units_have_to_fit_together(limit_mib: int, is_reported: bool) -> None:
    found = list(pool_problems(mesh({"kv_pool": "128MiB"}, {"kv_pool": "64MiB"}), MemoryLimit(limit_mib * MIB)))
    problem = "kv_pool and kv_swap of all units are together 192.0MiB; this machine has 191.0MiB"
    assert found == ([(("units",), problem)] if is_reported else [])


def test_of_a_unit_on_a_gpu_only_the_swap_region_is_memory_of_the_host() -> None:
    assert list(pool_problems(mesh(GPU), MemoryLimit(4 * MIB))) == []
    found = list(pool_problems(mesh(GPU), MemoryLimit(3 * MIB)))
    assert found == [(("units", 0, "kv_swap"), "kv_swap is 4.0MiB; this machine has 3.0MiB")]


def test_kvstore_needs_its_pool_and_its_own_memory() -> None:
    (unit,) = mesh({"kv_pool": "512MiB"}).units
    enough = 512 * MIB + KVSTORE_BYTES
    assert kvstore_problem(unit, MemoryLimit(enough, FILE)) is None
    assert kvstore_problem(unit, MemoryLimit(512 * MIB, FILE)) == (
        f"kv_pool and kv_swap are together 512.0MiB, and kvstore needs 96.0MiB besides; {LIMIT_TEXT} 512.0MiB"
    )


def test_a_worker_needs_the_weights_and_its_own_memory() -> None:
    (unit,) = mesh({"models": [NATIVE]}).units
    enough = 500 * MIB + WORKER_BYTES
    assert worker_problem(unit, unit.models[0], 500 * MIB, MemoryLimit(enough, FILE)) is None
    assert worker_problem(unit, unit.models[0], 500 * MIB, MemoryLimit(512 * MIB, FILE)) == (
        f"the weights of n are 500.0MiB, and a worker needs 384.0MiB besides; {LIMIT_TEXT} 512.0MiB"
    )


@pytest.mark.parametrize(
    ("unit", "needed_bytes", "problem"),
    [({}, SIM_WORKER_BYTES, "a worker needs 96.0MiB; "), (GPU, WORKER_BYTES, "a worker needs 384.0MiB; ")],
    ids=["sim", "GPU"],
)
def test_a_worker_without_weights_in_the_memory_of_the_host_needs_its_own_only(
    unit: dict[str, Any], needed_bytes: int, problem: str
) -> None:
    (config,) = mesh(unit).units
    (model,) = config.models
    assert worker_problem(config, model, 0, MemoryLimit(needed_bytes, FILE)) is None
    found = worker_problem(config, model, 0, MemoryLimit(needed_bytes - 1, FILE))
    assert found is not None and found.startswith(problem)


def test_all_processes_of_a_mesh_have_to_fit_into_one_container() -> None:
    config = mesh({"kv_pool": "256MiB"}, {"kv_pool": "256MiB", "models": [NATIVE]})
    own = 2 * KVSTORE_BYTES + ROUTER_BYTES + 2 * SIM_WORKER_BYTES + 2 * WORKER_BYTES + TOKENIZER_BYTES
    enough = 512 * MIB + 100 * MIB + own
    images = {Path("a"): 60 * MIB, Path("b"): 40 * MIB}
    assert list(mesh_problems(config, images, MemoryLimit(enough, FILE))) == []
    ((location, problem),) = mesh_problems(config, images, MemoryLimit(enough - MIB, FILE))
    assert location == ("units",)
    assert problem == (
        "kv_pool and kv_swap are together 512.0MiB, the weights 100.0MiB, and the processes need 1.3GiB besides; "
        f"{LIMIT_TEXT} 1.9GiB"
    )


def test_of_models_that_sleep_only_the_processes_count() -> None:
    models = [{"name": name} for name in "abc"]
    config = mesh({"kv_pool": "64MiB", "models": models, "max_awake_models": 1})
    enough = 64 * MIB + KVSTORE_BYTES + ROUTER_BYTES + 3 * TOKENIZER_BYTES
    enough += 2 * WORKER_BYTES + 4 * SLEEPING_WORKER_BYTES
    assert list(mesh_problems(config, {}, MemoryLimit(enough, FILE))) == []
    assert list(mesh_problems(config, {}, MemoryLimit(enough - MIB, FILE)))


def test_without_a_limit_of_a_cgroup_no_process_is_refused() -> None:
    machine, (unit,) = MemoryLimit(MIB), mesh({}).units
    assert kvstore_problem(unit, machine) is None
    assert worker_problem(unit, unit.models[0], 0, machine) is None
    assert list(mesh_problems(mesh({}), {}, machine)) == []
