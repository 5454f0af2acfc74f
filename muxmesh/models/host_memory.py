"""Whether the memory of a machine or a container holds what processes of the mesh need: pools, weights, their own.

Pure: the limit and the sizes of weights are arguments. Under a limit of a cgroup kvstore allocates its whole pool when
it starts, so the pool counts to kvstore's container and never to that of a worker (`kvstore.device_memory.reserve`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import MeshConfig, UnitConfig
from muxmesh.config.section import Location
from muxmesh.machine_limits import MemoryLimit, size_text
from muxmesh.types import Role

MIB = 1 << 20
KVSTORE_BYTES = 96 * MIB
"""What kvstore needs besides the pool and the swap region; measured: 46 MiB."""
SIM_WORKER_BYTES = 96 * MIB
"""What a worker of the sim engine needs; measured: 46 MiB."""
WORKER_BYTES = 384 * MIB
"""What a worker of the native engine needs besides the weights; measured on a CPU: 108 MiB, and 195 MiB more while the
kernels are compiled at the first start. On a GPU, where torch and the driver take more, it has not been measured."""
SLEEPING_WORKER_BYTES = 128 * MIB
"""What a worker of the native engine needs while its model sleeps; measured on a CPU: 90 MiB once it was awake."""
ROUTER_BYTES = 96 * MIB
"""What the router, its processes of chat templates and the supervisor need together for a sim model."""
TOKENIZER_BYTES = 128 * MIB
"""What the router and the supervisor need besides for each model with a tokenizer of its own; measured: 100 MiB."""


def pool_problems(config: MeshConfig, limit: MemoryLimit) -> Iterator[tuple[Location, str]]:
    """Yields each unit whose pool and swap region exceed ``limit``, and all units if only their sum does."""
    fits = True
    for index, unit in enumerate(config.units):
        if _pool_bytes(unit) > limit.num_bytes:
            fits = False
            yield ("units", index, "kv_swap" if unit.is_cuda else "kv_pool"), f"{_pool(unit)}; {limit}"
    together = sum(map(_pool_bytes, config.units))
    if fits and together > limit.num_bytes:
        yield ("units",), f"kv_pool and kv_swap of all units are together {size_text(together)}; {limit}"


def mesh_problems(
    config: MeshConfig, image_bytes: Mapping[Path, int], limit: MemoryLimit
) -> Iterator[tuple[Location, str]]:
    """Yields a problem if all processes of the mesh, in one container, exceed the limit of its cgroup.

    ``image_bytes``: size of each weight image that is in use at the same time as the others. All workers of a model
    share its image. Without such a limit there is no
    problem: the machine may swap, and the pool is allocated as it is used.
    """
    if not limit.is_of_cgroup:
        return
    pools = sum(map(_pool_bytes, config.units))
    weights = sum(image_bytes.values())
    own = len(config.units) * KVSTORE_BYTES + ROUTER_BYTES
    own += sum(len(Role) * size for unit in config.units for size in _largest_worker_bytes(unit))
    own += sum(TOKENIZER_BYTES for _, model in config.placements() if model.engine != "sim")
    if pools + weights + own > limit.num_bytes:
        yield (
            ("units",),
            f"kv_pool and kv_swap are together {size_text(pools)}, the weights {size_text(weights)}, and the processes "
            f"need {size_text(own)} besides; {limit}",
        )


def kvstore_problem(unit: UnitConfig, limit: MemoryLimit) -> str | None:
    """What kvstore of ``unit`` needs and the limit of its cgroup does not hold; None if it does."""
    if not limit.is_of_cgroup or _pool_bytes(unit) + KVSTORE_BYTES <= limit.num_bytes:
        return None
    return f"{_pool(unit)}, and kvstore needs {size_text(KVSTORE_BYTES)} besides; {limit}"


def worker_problem(unit: UnitConfig, model: ModelConfig, weights_bytes: int, limit: MemoryLimit) -> str | None:
    """What a worker of ``model`` needs and the limit of its cgroup does not hold; None if it does.

    ``weights_bytes``: size of the weight image; 0 for a sim model. The image is mapped as a file: a worker that cannot
    have all of it in memory would read it from the disk in each step.
    """
    own = _worker_bytes(unit, model)
    mapped = 0 if unit.is_cuda else weights_bytes
    if not limit.is_of_cgroup or mapped + own <= limit.num_bytes:
        return None
    weights = f"the weights of {model.name} are {size_text(mapped)}, and " if mapped else ""
    needs = f"a worker needs {size_text(own)} besides" if mapped else f"a worker needs {size_text(own)}"
    return f"{weights}{needs}; {limit}"


def _largest_worker_bytes(unit: UnitConfig) -> list[int]:
    """What a worker of each model needs, with as many models awake as may be, and those that need most."""
    sizes = sorted((_worker_bytes(unit, model) for model in unit.models), reverse=True)
    num_awake = len(sizes) if unit.max_awake_models is None else unit.max_awake_models
    return [*sizes[:num_awake], *(min(size, SLEEPING_WORKER_BYTES) for size in sizes[num_awake:])]


def _pool_bytes(unit: UnitConfig) -> int:
    """Host memory that kvstore allocates."""
    return unit.kv_swap if unit.is_cuda else unit.kv_pool + unit.kv_swap


def _pool(unit: UnitConfig) -> str:
    parts = "kv_swap is" if unit.is_cuda else "kv_pool and kv_swap are together"
    return f"{parts} {size_text(_pool_bytes(unit))}"


def _worker_bytes(unit: UnitConfig, model: ModelConfig) -> int:
    return SIM_WORKER_BYTES if model.engine == "sim" else WORKER_BYTES
