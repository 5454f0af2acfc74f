"""The meshes of chaos: what their configurations say, and which faults hit which of their processes."""

from pathlib import Path

import pytest

from benchmarks.chaos.meshes import CPU_MESH, GPU_MESH, ChaosMesh, plan_of
from benchmarks.chaos.plan import role_of
from muxmesh.config.schema import MeshConfig

KINDS = pytest.mark.parametrize("kind", [CPU_MESH, GPU_MESH])


@KINDS
def test_every_fault_hits_every_role_of_the_table_sooner_or_later(kind: ChaosMesh, tmp_path: Path) -> None:
    config = kind.config(tmp_path)
    plans = [plan_of(kind, seed, 300.0, config) for seed in range(30)]
    hit = {(fault.fault, role_of(fault.target)) for plan in plans for fault in plan}
    assert hit == {(fault.name, role) for fault in kind.faults for role in fault.roles}


@KINDS
def test_no_two_faults_have_the_same_name(kind: ChaosMesh) -> None:
    names = [fault.name for fault in kind.faults]
    assert len(set(names)) == len(names)


def test_the_unit_on_a_gpu_swaps_limits_its_workers_and_requires_gpu_ipc(tmp_path: Path) -> None:
    (unit,) = MeshConfig.model_validate(GPU_MESH.config(tmp_path)).units
    (model,) = unit.models
    assert (unit.device, unit.mps, unit.require_ipc) == ("cuda:0", "on", True)
    assert unit.kv_swap
    assert (model.compute_share.prefill, model.compute_share.decode) == (60, 40)


def test_the_outputs_expected_of_a_gpu_are_those_of_the_same_model_on_a_cpu(tmp_path: Path) -> None:
    assert GPU_MESH.reference is not None
    (reference,) = MeshConfig.model_validate(GPU_MESH.reference(tmp_path)).units
    (unit,) = MeshConfig.model_validate(GPU_MESH.config(tmp_path)).units
    assert reference.device == "cpu"
    assert [(model.name, model.source, model.dtype) for model in reference.models] == [
        (model.name, model.source, model.dtype) for model in unit.models
    ]


def test_without_a_gpu_the_same_seed_plans_what_it_always_did(tmp_path: Path) -> None:
    """Nothing of a GPU is among the targets."""
    plan = plan_of(CPU_MESH, 1, 300.0, CPU_MESH.config(tmp_path))
    assert not [fault for fault in plan if role_of(fault.target) == "mps"]
