"""A mesh on the GPU by `muxmesh up`, its processes, and tokens compared."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu.mps_daemon import control_program
from benchmarks.gpu.random_model import SMALL, TINY, write_random_model
from benchmarks.mesh_process import UpProcess, up
from muxmesh.cuda.mps import LOG_DIRECTORY, PIPE_DIRECTORY, MpsControl
from muxmesh.errors import Unavailable

PROMPTS: tuple[list[int] | str, ...] = (
    [5, 6, 7, 8],
    [int(7 * number % 251) + 3 for number in range(200)],
    [int(11 * number % 241) + 3 for number in range(33)],
    "x",
)
GPU_UNIT = {"device": "cuda:0", "kv_pool": "1GiB", "slab": "16MiB"}


def write_model(scratch: str, name: str, is_dry_run: bool) -> Path:
    """A folder with a model in f32: `tiny`, or `small`, which is tiny too in a dry run."""
    sizes = SMALL if name == "small" and not is_dry_run else TINY
    return write_random_model(Path(scratch) / name, sizes, "float32", "cpu" if is_dry_run else "cuda")


@contextlib.asynccontextmanager
async def mesh(config: Mapping[str, Any]) -> AsyncIterator[UpProcess]:
    """A mesh with this configuration, by `muxmesh up`. On an error the ends of its logs are printed."""
    with TemporaryDirectory(prefix="mm-") as folder:
        path = Path(folder) / "mesh.yaml"
        path.write_text(json.dumps(config))
        async with up("-c", str(path)) as running:
            with contextlib.ExitStack() as logs:
                logs.callback(_print_logs, running.state_dir / "logs")
                yield running
                logs.pop_all()


def _print_logs(folder: Path) -> None:
    for log in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"--- {log.relative_to(folder)}\n{log.read_text(errors='replace')[-700:]}")


def gpu_unit(is_dry_run: bool) -> dict[str, Any]:
    """The fields of a unit on the first GPU, without models."""
    return {**GPU_UNIT, "kv_pool": "64MiB", "slab": "2MiB"} if is_dry_run else dict(GPU_UNIT)


def workers_of(running: UpProcess) -> list[int]:
    """The ids of all prefill and decode workers."""
    return [pid for pid, command in running.pids().items() if "decode_svc" in command or "prefill_svc" in command]


def environment_of(pid: int) -> dict[str, str]:
    """The variables that a process was started with."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(entry.partition("=")[::2] for entry in entries if "=" in entry)


def control_of(worker: int) -> MpsControl:
    """Control of the MPS daemon whose client a worker is, from the worker's environment."""
    environment = environment_of(worker)
    if PIPE_DIRECTORY not in environment:
        raise Unavailable(f"worker {worker} has no {PIPE_DIRECTORY} in its environment")
    pipe_dir = Path(environment[PIPE_DIRECTORY])
    return MpsControl(control_program(), pipe_dir, Path(environment.get(LOG_DIRECTORY, str(pipe_dir))))


def differing(found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> str:
    """How far each output that differs is equal."""
    pairs = [(one, other) for one, other in zip(found, expected, strict=True) if one != other]
    return ", ".join(f"{common_length(one, other)} of {len(other)} equal" for one, other in pairs) or "all equal"


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
