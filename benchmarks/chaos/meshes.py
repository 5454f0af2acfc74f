"""The meshes that are disturbed: models, configuration, machine, faults and load.

On CPUs: two units, two tiny models of random weights, a pool that is too small for the load. On a fake GPU
(`tests.support.gpu_machine`): one unit, one model whose kernels are interpreted, so that everything is slow.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos.cases import FULL_LOAD, GPU_LOAD, LoadSize
from benchmarks.chaos.faults import CLIENT, FAULTS, MODEL, Fault
from benchmarks.chaos.gpu_faults import GPU_FAULTS
from benchmarks.chaos.plan import PlannedFault, plan_faults
from benchmarks.chaos.processes import names_of
from muxmesh.config.runtime import MeshRuntime, MpsDaemons
from muxmesh.config.schema import MeshConfig
from tests.support.fake_driver import UUID
from tests.support.gpu_machine import gpu_machine
from tests.support.mps import FAKE_PROGRAM
from tests.support.tiny import TinyShape


@dataclass(frozen=True, slots=True)
class ChaosMesh:
    """A kind of mesh.

    ``shapes``: of its models. ``config`` and ``reference`` return a configuration for models in a folder: of the mesh,
    and of the one whose outputs are expected; None: those of the mesh before the faults. ``machine``: the processes of
    the mesh start inside of it. ``pace``: see `plan_faults`.
    """

    shapes: Mapping[str, TinyShape]
    config: Callable[[Path], dict[str, Any]]
    faults: tuple[Fault, ...]
    load: LoadSize
    pace: float = 1.0
    machine: Callable[[], AbstractContextManager[None]] = nullcontext
    reference: Callable[[Path], dict[str, Any]] | None = None


def plan_of(kind: ChaosMesh, seed: int, seconds: float, config: dict[str, Any]) -> list[PlannedFault]:
    """The faults of a run."""
    parsed = MeshConfig.model_validate(config)
    runtime = MeshRuntime(
        config=parsed,
        run_dir=Path(),
        cache_dir=Path(),
        redis_url="",
        prepared={},
        device_uuids={unit.name: UUID for unit in parsed.units if unit.is_cuda},
        mps=MpsDaemons(program=FAKE_PROGRAM, log_dir=Path()),
    )
    names = [*names_of(runtime), CLIENT, *(f"{MODEL}/{model}" for model in runtime.config.models())]
    return list(plan_faults(random.Random(f"{seed} faults"), seconds, kind.faults, names, kind.pace))


_CPU_SHAPES = {
    "wide": TinyShape(num_heads=4, num_kv_heads=4, head_dim=32),
    "small": TinyShape(num_heads=3, num_kv_heads=3, head_dim=16, seed=1),
}


def _cpu_config(folder: Path) -> dict[str, Any]:
    """``wide`` on both units, ``small`` on the first. The pool holds 512 tokens of ``wide``.

    With one core there is one unit.
    """
    cores = sorted(os.sched_getaffinity(0))
    models = [
        {"name": name, "source": str(folder / name), "threads": 1, "max_num_seqs": 6, "kv_answer_tokens": 32}
        for name in _CPU_SHAPES
    ]
    memory = {"kv_pool": "1MiB", "slab": "64KiB", "kv_swap": "512KiB"}
    units = [
        {"name": "unit0", **memory, "cores": cores[::2], "models": models},
        {"name": "unit1", **memory, "cores": cores[1::2], "models": models[:1]},
    ]
    return {"units": units if len(cores) > 1 else units[:1]}


_GPU_SHAPES = {"tiny": TinyShape(num_heads=2, num_kv_heads=1, head_dim=256, seed=3)}


def _gpu_model(folder: Path) -> dict[str, Any]:
    return {"name": "tiny", "source": str(folder / "tiny"), "max_num_seqs": 6, "kv_answer_tokens": 8}


def _gpu_config(folder: Path) -> dict[str, Any]:
    """The pool holds 256 tokens, of which a request needs at most 220: six at once do not fit."""
    model = {**_gpu_model(folder), "prefill_token_budget": 32, "compute_share": {"prefill": 60, "decode": 40}}
    unit = {"device": "cuda:0", "mps": "on", "require_ipc": True, "models": [model]}
    return {"units": [{**unit, "kv_pool": "1MiB", "slab": "64KiB", "kv_swap": "1MiB"}]}


def _gpu_reference(folder: Path) -> dict[str, Any]:
    return {"units": [{"kv_pool": "16MiB", "slab": "64KiB", "models": [{**_gpu_model(folder), "threads": 1}]}]}


def _gpu_machine() -> AbstractContextManager[None]:
    """The fake programs run with this interpreter, not with a slow shim that comes first."""
    os.environ["PATH"] = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
    return gpu_machine()


CPU_MESH = ChaosMesh(_CPU_SHAPES, _cpu_config, FAULTS, FULL_LOAD)
GPU_MESH = ChaosMesh(
    _GPU_SHAPES, _gpu_config, GPU_FAULTS, GPU_LOAD, pace=4.0, machine=_gpu_machine, reference=_gpu_reference
)
