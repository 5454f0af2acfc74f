"""Many small models on one device with few awake: wake times, memory, idle CPU, and whether every request is answered.

The models have random weights and one shape, so one set of kernels serves all of them. Wake times are the unit's own
(from its decision until a prefill and a decode worker can compute); a request also waits for another model to fall
asleep.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.random_model import RandomModel, write_random_model
from benchmarks.mesh_process import UpProcess, cpu_s, proportional_bytes, up
from benchmarks.report import Report
from muxmesh.config.runtime import MeshRuntime
from muxmesh.errors import MeshError
from muxmesh.internal.v1 import admin_pb2, admin_pb2_grpc
from muxmesh.process_state import own_memory_bytes
from muxmesh.rpc.channels import internal_channel
from muxmesh.v1 import mesh_pb2

SHAPE = RandomModel(
    num_layers=6, hidden_size=320, num_heads=5, num_kv_heads=5, head_dim=64, intermediate_size=896, vocab_size=259,
    context_len=1024, tied=False,
)  # fmt: skip
"""About 8 million parameters, 32 MB in float32."""
MAX_WAKE_S = 2.0
IDLE_S = 10.0
NUM_TOKENS = 16
SMOLLM2 = "smollm2-135m-instruct"
_MB = 1e6


class Models:
    """The models of a running mesh, by name, and commands to them."""

    def __init__(self, mesh: UpProcess, names: list[str]) -> None:
        self.mesh = mesh
        self.names = names
        (runtime_file,) = mesh.state_dir.glob("run-*/runtime.json")
        self._admin = MeshRuntime.read(runtime_file).admin_address("router")

    async def request(self, name: str) -> float:
        """Seconds until the whole output of one request is there. Raises MeshError."""
        started_at_s = time.monotonic()
        completion = await self.mesh.client.generate(
            "Once upon a time", model=name, max_new_tokens=NUM_TOKENS, temperature=0.0, seed=1
        )
        assert completion.token_ids
        return time.monotonic() - started_at_s

    async def states(self) -> dict[str, mesh_pb2.UnitModelStatus]:
        return {model.model: model for model in (await self.mesh.client.status()).units[0].models}

    async def drop(self, name: str) -> None:
        async with internal_channel(self._admin) as channel:
            stub = admin_pb2_grpc.RouterAdminServiceStub(channel)
            await stub.PutModelToSleep(admin_pb2.PutModelToSleepRequest(model=name, drop_weights=True), timeout=60)

    async def wake_times_s(self, names: list[str]) -> list[float]:
        """Requests each model, which sleeps, in turn; the seconds for which it was waking."""
        found = []
        for name in names:
            before = (await self.states())[name]
            assert before.state == "asleep", f"{name} is {before.state}"
            await self.request(name)
            found.append((await self.states())[name].last_waking_s)
        return found


async def idle_percent(mesh: UpProcess) -> float:
    """CPU of all workers of the mesh over IDLE_S, in percent of one core."""
    pids = [pid for pid, command in mesh.pids().items() if "_svc" in command]
    before = sum(map(cpu_s, pids))
    await asyncio.sleep(IDLE_S)
    return (sum(map(cpu_s, pids)) - before) / IDLE_S * 100


def memory_mb(mesh: UpProcess) -> dict[str, float]:
    """Proportional memory of the whole mesh, and the own memory of its workers: the mean and the largest."""
    pids = mesh.pids()
    workers = [own_memory_bytes(pid) / _MB for pid, command in pids.items() if "_svc" in command]
    whole = sum(map(proportional_bytes, pids)) / _MB
    return {"whole": whole, "worker mean": statistics.mean(workers), "worker max": max(workers)}


async def many(report: Report, folder: Path, num_models: int, num_awake: int, num_requests: int) -> None:
    """``num_models`` small models, of which ``num_awake`` may be awake."""
    names = [f"m{index:02}" for index in range(num_models)]
    for index, name in enumerate(names):
        write_random_model(folder / name, dataclasses.replace(SHAPE, seed=index), "float32")
    listed = "\n".join(f"      - {{name: {name}, source: {folder / name}, max_num_seqs: 4}}" for name in names)
    config = folder / "mesh.yaml"
    config.write_text(
        f"units:\n  - max_awake_models: {num_awake}\n    kv_pool: 256MiB\n    slab: 2MiB\n    models:\n{listed}\n"
    )
    async with up("-c", str(config)) as mesh:
        models = Models(mesh, names)
        figures: dict[str, Any] = {"start_s": mesh.ready_at_s - mesh.started_at_s}
        figures["memory_mb at the start"] = memory_mb(mesh)
        figures["idle_percent at the start"] = await idle_percent(mesh)
        cold = [name for name in names if (await models.states())[name].state == "asleep"]
        figures["wake_s first"] = await models.wake_times_s(cold)
        figures["memory_mb after all were awake"] = memory_mb(mesh)
        figures["idle_percent after all were awake"] = await idle_percent(mesh)
        kept = names[: num_models - num_awake]  # those that were awake last are awake
        figures["wake_s kept"] = await models.wake_times_s(kept)
        for name in names:
            await models.drop(name)
        figures["memory_mb with all weights dropped"] = memory_mb(mesh)
        figures["wake_s dropped"] = await models.wake_times_s(names)
        figures["load"] = await load(models, num_requests)
        report.figures[f"{num_models} models"] = figures
        _bars(report, f"{num_models} models, {num_awake} awake", figures)


async def load(models: Models, num_requests: int) -> dict[str, Any]:
    """Requests at random, the first models more often, all at once; how many were answered, and after how long."""
    chance = random.Random(0)
    weights = [1 / (1 + index) for index in range(len(models.names))]
    wanted = chance.choices(models.names, weights, k=num_requests)
    num_wakes = sum(model.num_wakes for model in (await models.states()).values())
    results = await asyncio.gather(*map(models.request, wanted), return_exceptions=True)
    answered = [result for result in results if isinstance(result, float)]
    return {
        "requests": num_requests,
        "models": len(set(wanted)),
        "failed": [str(result) for result in results if isinstance(result, MeshError)],
        "lost": num_requests - len(answered),
        "wakes": sum(model.num_wakes for model in (await models.states()).values()) - num_wakes,
        "seconds": sorted(answered),
    }


async def large(report: Report, folder: Path) -> None:
    """SmolLM2 beside a small model, of which one may be awake."""
    write_random_model(folder / "small", SHAPE, "float32")
    config = folder / "large.yaml"
    config.write_text(
        "units:\n  - max_awake_models: 1\n    kv_pool: 256MiB\n    models:\n"
        f"      - {{name: {SMOLLM2}, max_num_seqs: 4}}\n      - {{name: small, source: {folder / 'small'}}}\n"
    )
    async with up("-c", str(config)) as mesh:
        models = Models(mesh, [SMOLLM2, "small"])
        figures: dict[str, Any] = {"wake_s kept": [], "wake_s dropped": []}
        await models.request("small")
        for _ in range(5):
            figures["wake_s kept"] += await models.wake_times_s([SMOLLM2])
            await models.request("small")
        for _ in range(5):
            await models.drop(SMOLLM2)
            figures["wake_s dropped"] += await models.wake_times_s([SMOLLM2])
            await models.request("small")
        figures["memory_mb"] = memory_mb(mesh)
        report.figures[SMOLLM2] = figures
        _bars(report, SMOLLM2, figures)


def _bars(report: Report, name: str, figures: dict[str, Any]) -> None:
    for how in ("first", "kept", "dropped"):
        times = figures.get(f"wake_s {how}")
        if times:
            bound, is_met = f"<= {MAX_WAKE_S:g}", max(times) <= MAX_WAKE_S
            report.bar(f"{name}: wake {how}, median s", statistics.median(times))
            if how == "kept":
                report.bar(f"{name}: wake {how}, longest s", max(times), bound, is_met)
            else:
                report.bar(f"{name}: wake {how}, longest s", max(times), aim=bound, is_reached=is_met)
    for key, value in figures.items():
        if key.startswith("idle_percent"):
            report.bar(f"{name}: CPU of idle workers {key.removeprefix('idle_percent ')}, % of a core", value)
        elif key.startswith("memory_mb"):
            report.bar(f"{name}: whole mesh {key.removeprefix('memory_mb ')}, MB", value["whole"])
            report.bar(f"{name}: own memory of a worker {key.removeprefix('memory_mb ')}, MB", value["worker mean"])
    if "load" in figures:
        loaded = figures["load"]
        report.bar(f"{name}: requests lost of {loaded['requests']}", loaded["lost"], "0", loaded["lost"] == 0)
        report.bar(f"{name}: wakes under load", loaded["wakes"])
        report.bar(f"{name}: longest request under load, s", max(loaded["seconds"], default=0.0))


def main() -> int:
    """Runs both parts; returns 0 if every required value is met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--awake", type=int, default=3)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--skip-large", action="store_true", help=f"without {SMOLLM2}")
    arguments = parser.parse_args()
    report = Report("many_models")
    with tempfile.TemporaryDirectory(prefix="mm-models-") as folder:
        asyncio.run(many(report, Path(folder), arguments.models, arguments.awake, arguments.requests))
        if not arguments.skip_large:
            asyncio.run(large(report, Path(folder)))
    return 0 if report.write() else 1


if __name__ == "__main__":
    sys.exit(main())
