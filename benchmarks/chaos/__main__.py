"""`python -m benchmarks.chaos --seconds N --seed S`: exit code 1 if anything was lost, altered, leaked or not repaired.

Two units, two tiny models of random weights, a pool that is too small for the load. The same seed gives the same plan
of faults and the same requests.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.chaos.faults import CLIENT, FAULTS
from benchmarks.chaos.plan import PlannedFault, plan_faults, show_plan
from benchmarks.chaos.processes import MeshProcesses, names_of
from benchmarks.chaos.run import ChaosRun
from benchmarks.mesh_process import up
from benchmarks.report import OUT
from muxmesh.config.runtime import MeshRuntime
from muxmesh.config.schema import MeshConfig
from tests.support.tiny import TinyShape, write_tiny_model

_FOLDER = OUT.parent / "chaos"
"""For logs and compiled kernels."""
SHAPES = {
    "wide": TinyShape(num_heads=4, num_kv_heads=4, head_dim=32),
    "small": TinyShape(num_heads=3, num_kv_heads=3, head_dim=16, seed=1),
}


def mesh_config(folder: Path) -> dict[str, Any]:
    """``wide`` on both units, ``small`` on the first. The pool holds 512 tokens of ``wide``.

    With one core there is one unit.
    """
    cores = sorted(os.sched_getaffinity(0))
    models = [
        {"name": name, "source": str(folder / name), "threads": 1, "max_num_seqs": 6, "kv_answer_tokens": 32}
        for name in SHAPES
    ]
    memory = {"kv_pool": "1MiB", "slab": "64KiB", "kv_swap": "512KiB"}
    units = [
        {"name": "unit0", **memory, "cores": cores[::2], "models": models},
        {"name": "unit1", **memory, "cores": cores[1::2], "models": models[:1]},
    ]
    return {"units": units if len(cores) > 1 else units[:1]}


def make_plan(seed: int, seconds: float, config: dict[str, Any]) -> list[PlannedFault]:
    """The faults of a run."""
    runtime = MeshRuntime(
        config=MeshConfig.model_validate(config), run_dir=Path(), cache_dir=Path(), redis_url="", prepared={}
    )
    return list(plan_faults(random.Random(f"{seed} faults"), seconds, FAULTS, [*names_of(runtime), CLIENT]))


async def run(seed: int, seconds: float, folder: Path) -> int:
    """Runs and prints the result; returns the exit code."""
    config = mesh_config(folder)
    plan = make_plan(seed, seconds, config)
    for name, shape in SHAPES.items():
        write_tiny_model(folder / name, shape)
    (folder / "mesh.yaml").write_text(yaml.safe_dump(config))
    async with up("--config", str(folder / "mesh.yaml")) as mesh:
        (runtime_file,) = mesh.state_dir.glob("run-*/runtime.json")
        chaos = ChaosRun(mesh, MeshProcesses(mesh.process.pid, MeshRuntime.read(runtime_file)), seed)
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
    parser.add_argument("--show-plan", action="store_true", help="print the faults of the seed, and start nothing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mm-chaos-") as folder:
        if arguments.show_plan:
            print(show_plan(make_plan(arguments.seed, arguments.seconds, mesh_config(Path(folder)))))
            return 0
        return asyncio.run(run(arguments.seed, arguments.seconds, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
