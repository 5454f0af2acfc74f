"""`python -m benchmarks.chaos --seconds N --seed S [--gpu]`: exit code 1 if anything was lost, altered, leaked or not
repaired.

The same seed gives the same plan of faults and the same requests. The meshes are described in `meshes`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.chaos.history import Call
from benchmarks.chaos.meshes import CPU_MESH, GPU_MESH, ChaosMesh, plan_of
from benchmarks.chaos.plan import PlannedFault, show_plan
from benchmarks.chaos.processes import MeshProcesses
from benchmarks.chaos.run import ChaosRun, cases_of, undisturbed_calls
from benchmarks.mesh_process import up
from benchmarks.report import OUT
from muxmesh.config.runtime import MeshRuntime
from tests.support.tiny import write_tiny_model

_FOLDER = OUT.parent / "chaos"
"""For logs and compiled kernels."""


async def run(kind: ChaosMesh, seed: int, seconds: float, folder: Path) -> int:
    """Runs and prints the result; returns the exit code."""
    for name, shape in kind.shapes.items():
        write_tiny_model(folder / name, shape)
    reference = None
    if kind.reference is not None:
        print("the cases on the CPU", flush=True)
        reference = await _reference(kind, kind.reference(folder), seed, folder)
    with kind.machine():
        return await _run(kind, seed, seconds, folder, reference)


async def _run(kind: ChaosMesh, seed: int, seconds: float, folder: Path, reference: Sequence[Call] | None) -> int:
    config = kind.config(folder)
    plan: list[PlannedFault] = plan_of(kind, seed, seconds, config)
    async with up("--config", _written(folder, config)) as mesh:
        (runtime_file,) = mesh.state_dir.glob("run-*/runtime.json")
        processes = MeshProcesses(mesh.process.pid, MeshRuntime.read(runtime_file))
        chaos = ChaosRun(kind, mesh, processes, seed, reference)
        try:
            await chaos.run(seconds, plan)
            await chaos.stop()
        except BaseException:
            _keep_logs(mesh.state_dir, seed)
            raise
        if chaos.violations:
            _keep_logs(mesh.state_dir, seed)
        print(*chaos.lines(seconds), sep="\n", flush=True)
    return 1 if chaos.violations else 0


async def _reference(kind: ChaosMesh, config: dict[str, Any], seed: int, folder: Path) -> list[Call]:
    """The calls of the cases on another mesh."""
    async with up("--config", _written(folder, config)) as mesh:
        return await undisturbed_calls(mesh.address, cases_of(seed, list(kind.shapes), kind.load), kind.load)


def _written(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "mesh.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def _keep_logs(state_dir: Path, seed: int) -> None:
    kept = _FOLDER / f"seed-{seed}"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(state_dir / "logs", kept)
    print(f"logs are kept in {kept}", flush=True)


def main() -> int:
    """Parses the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    # Kernels are compiled by the first run, not in the middle of one because another checkout uses the same cache.
    os.environ["MUXMESH_CACHE_DIR"] = str(_FOLDER / "cache")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--gpu", action="store_true", help="a unit on a fake GPU; expected are the outputs of the CPU")
    parser.add_argument("--show-plan", action="store_true", help="print the faults of the seed, and start nothing")
    arguments = parser.parse_args()
    kind = GPU_MESH if arguments.gpu else CPU_MESH
    with tempfile.TemporaryDirectory(prefix="mm-chaos-") as folder:
        if arguments.show_plan:
            print(show_plan(plan_of(kind, arguments.seed, arguments.seconds, kind.config(Path(folder)))))
            return 0
        return asyncio.run(run(kind, arguments.seed, arguments.seconds, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
