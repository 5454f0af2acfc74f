"""A whole mesh of real processes for one test, and ways to look into it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from muxmesh.client import Delta, Finish, MeshClient
from muxmesh.clock import SystemClock
from muxmesh.config.runtime import SUPERVISOR
from muxmesh.config.schema import MeshConfig
from muxmesh.cuda.device_list import DeviceList
from muxmesh.errors import MeshError
from muxmesh.metrics.scrape import fetch
from muxmesh.models.gpu_check import mps_program, unit_gpus, with_share_limits
from muxmesh.models.prepared_model import packing_of, prepare_model
from muxmesh.supervisor.admin_service import serving_commands
from muxmesh.supervisor.mesh_supervisor import MeshSupervisor, free_listen_address, make_runtime
from muxmesh.supervisor.model_loading import ModelLoading
from muxmesh.supervisor.supervised_process import SupervisedProcess
from muxmesh.v1 import mesh_pb2

SIM_MODEL = {
    "name": "sim", "engine": "sim", "sim": {"base_s": 0.002}, "max_num_seqs": 8, "continuous_decode_steps": 4
}  # fmt: skip


@dataclass(frozen=True)
class Scrape:
    """The metrics of a mesh at one time, as Prometheus text."""

    text: str

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples of ``name`` with these labels. There is at least one."""
        found = [
            sample.value
            for family in text_string_to_metric_families(self.text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert found, f"no sample of {name} has {labels}"
        return sum(found)


class RunningMesh:
    """A mesh that serves, with a client to it."""

    def __init__(self, mesh: MeshSupervisor, client: MeshClient) -> None:
        self.mesh = mesh
        self.client = client
        self.address = mesh.runtime.config.listen

    def process(self, name: str) -> SupervisedProcess:
        return next(process for process in self.mesh.processes if process.spec.name == name)

    def pid(self, name: str) -> int:
        pid = self.process(name).pid
        assert pid is not None
        return pid

    async def metrics(self) -> Scrape:
        """A scrape of a mesh whose configuration has `metrics`."""
        status, body = await fetch(self.mesh.metrics_address, "/metrics", 20.0)
        assert status == 200
        return Scrape(body.decode())

    async def restart(self, name: str) -> None:
        """Ends a process in order, and waits until another serves in its place."""
        before = self.pid(name)
        self.process(name).signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            while self.process(name).pid in (None, before) or not await self._serves():
                await asyncio.sleep(0.05)

    async def _serves(self) -> bool:
        try:
            await self.client.list_models(timeout_s=1.0)
        except MeshError:
            return False
        return True

    async def unit(self) -> mesh_pb2.UnitStatus:
        return (await self.client.status()).units[0]

    async def num_leases(self) -> int:
        unit = await self.unit()
        assert unit.connected
        return sum(model.num_leases + model.num_credits for model in unit.models)

    async def until(self, what: Callable[[], Awaitable[Any]]) -> None:
        """Waits until ``what()`` is true; each look is a call to the mesh."""
        async with asyncio.timeout(30):
            while not await what():
                await asyncio.sleep(0.02)

    async def until_free(self) -> None:
        """Waits until nothing is leased, waiting or running any more."""

        async def free() -> bool:
            status = await self.client.status()
            unit = status.units[0]
            idle = all(model.num_leases + model.num_credits + model.num_queued_requests == 0 for model in unit.models)
            return unit.connected and idle and unit.pool.leased_bytes == 0

        await self.until(free)


@asynccontextmanager
async def running_mesh(
    state_dir: Path, modules: Mapping[str, str] | None = None, **config: Any
) -> AsyncIterator[RunningMesh]:
    """Starts a mesh with this configuration; afterwards checks that no process is left.

    ``modules``: what runs instead of a process's own module. The length predictor has a minute for each request unless
    ``config`` says otherwise, so that a busy machine does not change forecasts. With `tls` the client uses the unix
    socket of a router.
    """
    router = {"predictor_budget_s": 60, **config.pop("router", {})}
    parsed = MeshConfig.model_validate({"listen": "127.0.0.1:0", "router": router, **config})
    parsed = parsed.model_copy(update={"listen": free_listen_address(parsed.listen)})
    cache_dir = Path(os.environ["MUXMESH_CACHE_DIR"])
    prepared = {
        unit.name: {
            model.name: prepare_model(model, packing_of(unit), state_dir, cache_dir, lambda what, done, total: None)
            for model in unit.models
        }
        for unit in parsed.units
    }
    lines: list[str] = []
    devices, program = DeviceList(), mps_program(parsed)
    parsed = with_share_limits(parsed, devices, program)
    runtime = make_runtime(parsed, prepared, state_dir, cache_dir, unit_gpus(parsed, devices), program)
    mesh = MeshSupervisor(runtime, state_dir, lambda name, line: lines.append(f"{name} | {line}"), SystemClock())
    for process in mesh.processes:
        if (module := (modules or {}).get(process.spec.name)) is not None:
            interpreter, dash_m, _, *arguments = process.spec.command
            process.spec = replace(process.spec, command=(interpreter, dash_m, module, *arguments))
    pids: set[int] = set()
    try:
        await mesh.start()
        commands = serving_commands(ModelLoading(mesh), runtime.admin_address(SUPERVISOR))
        sockets = [endpoint.address for key, endpoint in runtime.endpoints().items() if key.role == "router"]
        own = parsed.listen if parsed.tls is None else sockets[0]
        async with commands, MeshClient(own) as client:
            yield RunningMesh(mesh, client)
    except BaseException:
        print("\n".join(lines[-60:]))
        raise
    finally:
        pids |= {process.pid for process in mesh.processes if process.pid is not None}
        await mesh.stop()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()], "a process is left behind"
    assert not runtime.run_dir.exists()


async def collect(deltas: AsyncIterator[Delta]) -> tuple[str, list[int], Finish]:
    """Text, tokens and finish of a stream."""
    text, finish = "", None
    tokens: list[int] = []
    async for delta in deltas:
        text += delta.text
        tokens += delta.token_ids
        finish = delta.finish or finish
    assert finish is not None
    return text, tokens, finish
