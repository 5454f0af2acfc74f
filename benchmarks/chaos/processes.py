"""The processes of a running mesh, found through /proc by the names that the mesh gives them.

Starts only control programs, which ask the MPS daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from pathlib import Path

import grpc
import redis.asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis.exceptions import RedisError

from benchmarks.mesh_process import children_of
from muxmesh.config.runtime import MeshRuntime, ProcessKey
from muxmesh.cuda.mps import CONTROL_PROGRAM, PIPE_DIRECTORY, MpsControl
from muxmesh.errors import Unavailable
from muxmesh.process_state import has_ended
from muxmesh.rpc.channels import internal_channel
from muxmesh.supervisor.mps_checks import mps_answers
from muxmesh.supervisor.mps_leftovers import SERVER_PROGRAM
from muxmesh.types import Role

REDIS = "redis"
MPS = "mps"
"""The role of an MPS daemon, which is named mps/ and the beginning of its GPU's UUID."""
MPS_QUESTION = "question to MPS"
"""The name of a process that asks a daemon and ends at once."""
_DAEMON_MODULE = "muxmesh.supervisor.mps_daemon"
"""What becomes the daemon."""
_PROBE_TIMEOUT_S = 3.0
_MODULES: dict[str, str | Role] = {
    "router": "router",
    "kvstore": "kvstore",
    **{f"{role.value}_svc": role for role in Role},
}


class MeshProcesses:
    """Processes of the mesh that ``supervisor_pid`` runs, by name such as decode/unit0/small, router or redis."""

    def __init__(self, supervisor_pid: int, runtime: MeshRuntime) -> None:
        self.supervisor_pid = supervisor_pid
        self.runtime = runtime
        self.listen = runtime.config.listen
        self.models = list(runtime.config.models())
        self._keys = {endpoint.name: key for key, endpoint in runtime.endpoints().items()}
        self._addresses = {endpoint.name: endpoint.address for endpoint in runtime.endpoints().values()}

    @property
    def names(self) -> list[str]:
        """All processes that should run, whether they do or not."""
        return names_of(self.runtime)

    def pid(self, name: str) -> int:
        """Raises LookupError if the process does not run."""
        for pid, found in self.by_pid().items():
            if found == name:
                return pid
        raise LookupError(f"{name} does not run")

    def by_pid(self) -> dict[int, str]:
        """Pid → name of every descendant of the supervisor. Others have their command line for a name, ended ones
        `zombie`.
        """
        return {pid: self._name(pid) for pid in children_of(self.supervisor_pid)}

    def restarted_with(self, name: str) -> list[str]:
        """The processes that restart if ``name`` ends: for a kvstore, all of its unit."""
        keys = self.runtime.endpoints()
        units = {key.unit for key, endpoint in keys.items() if endpoint.name == name and key.role == "kvstore"}
        return [name, *(one.name for key, one in keys.items() if key.unit in units and one.name != name)]

    def kvstore_of(self, name: str) -> str:
        """The kvstore of a worker's unit."""
        return self.runtime.display_name(ProcessKey("kvstore", self._keys[name].unit))

    def daemon_of(self, name: str) -> str:
        """The MPS daemon of a worker's unit, which uses MPS."""
        return _daemon_name(self._control(self._keys[name].unit).pipe_dir)

    def group_of(self, daemon: str) -> list[str]:
        """The kvstores and the workers of all units on a daemon's GPU."""
        units = self._units_of(daemon)
        return [name for name, key in self._keys.items() if key.unit in units]

    def pipe_dir(self, daemon: str) -> Path:
        return self._control(self._units_of(daemon)[0]).pipe_dir

    async def clients_of(self, daemon: str) -> frozenset[int]:
        """The pids that a daemon lists. Raises LookupError if it does not answer."""
        try:
            servers = await self._control(self._units_of(daemon)[0]).servers()
        except Unavailable as error:
            raise LookupError(str(error)) from None
        return frozenset(pid for server in servers for pid in server.clients)

    def remnants(self) -> dict[int, str]:
        """Processes that name the folder of this mesh in their command line or environment, with any parent."""
        folder = str(self.runtime.run_dir).encode()
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            pid = int(process.name)
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
                if any(folder in word for word in words) and pid != os.getpid() and not has_ended(pid):
                    found[pid] = self._name(pid)
        return found

    def _control(self, unit: str) -> MpsControl:
        return self.runtime.mps_control(unit)

    def _units_of(self, daemon: str) -> list[str]:
        units = [unit.name for unit in self.runtime.config.units if self.runtime.uses_mps(unit.name)]
        return [unit for unit in units if _daemon_name(self._control(unit).pipe_dir) == daemon]

    async def serves(self, name: str, not_pid: int | None, within_s: float) -> bool:
        """Waits until the process serves, in another process than ``not_pid``. False after ``within_s``."""
        end_s = time.monotonic() + within_s
        while time.monotonic() < end_s:
            with contextlib.suppress(LookupError):
                if self.pid(name) != not_pid and await self._probe(name):
                    return True
            await asyncio.sleep(0.1)
        return False

    async def _probe(self, name: str) -> bool:
        """Asks once, without the supervisor's own probes: chaos judges them too."""
        if name == REDIS:
            client = redis.asyncio.Redis.from_url(self.runtime.redis_url, socket_timeout=_PROBE_TIMEOUT_S)
            try:
                return bool(await client.ping())
            except (RedisError, OSError):
                return False
            finally:
                await client.aclose()
        if name not in self._addresses:
            return await mps_answers(self._control(self._units_of(name)[0]))
        async with internal_channel(self._addresses[name]) as channel:
            try:
                request = health_pb2.HealthCheckRequest()
                response = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=_PROBE_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                return False
            return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def _name(self, pid: int) -> str:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            return "ended"
        if not any(words):
            return "zombie"
        if any("redis-server" in word for word in words):
            return REDIS
        if SERVER_PROGRAM in words[0]:
            return "MPS server"
        if any(CONTROL_PROGRAM in word or word == _DAEMON_MODULE for word in words):
            return self._daemon_or_question(pid, words)
        values = dict(itertools.pairwise(words))
        if (module := values.get("-m", "")) not in _MODULES:
            return module or " ".join(words)
        key = ProcessKey(_MODULES[module], values.get("--unit", ""), values.get("--model", ""))  # type: ignore[arg-type]
        return self.runtime.display_name(key)

    def _daemon_or_question(self, pid: int, words: list[str]) -> str:
        if _DAEMON_MODULE in words:
            return _daemon_name(self._control(words[words.index("--unit") + 1]).pipe_dir)
        if "-f" not in words:
            return MPS_QUESTION
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            return "ended"
        values = dict(one.split("=", 1) for one in variables if "=" in one)
        return _daemon_name(Path(values.get(PIPE_DIRECTORY, "")))


def _daemon_name(pipe_dir: Path) -> str:
    return pipe_dir.name.replace("-", "/", 1)


def names_of(runtime: MeshRuntime) -> list[str]:
    """Names of all processes of a mesh."""
    on_mps = [unit.name for unit in runtime.config.units if runtime.uses_mps(unit.name)]
    daemons = {_daemon_name(runtime.mps_control(unit).pipe_dir): None for unit in on_mps}
    return [*(endpoint.name for endpoint in runtime.endpoints().values()), *daemons, REDIS]
