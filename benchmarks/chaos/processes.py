"""The processes of a running mesh, found through /proc by the names that the mesh gives them. Starts nothing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from pathlib import Path

import grpc
import redis.asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis.exceptions import RedisError

from benchmarks.mesh_process import children_of
from muxmesh.config.runtime import MeshRuntime, ProcessKey
from muxmesh.rpc.channels import internal_channel
from muxmesh.types import Role

REDIS = "redis"
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

    def is_alive(self, pid: int) -> bool:
        """Whether a process has neither ended nor become a zombie."""
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
        except OSError:
            return False

    def restarted_with(self, name: str) -> list[str]:
        """The processes that restart if ``name`` ends: for a kvstore, all of its unit."""
        keys = self.runtime.endpoints()
        units = {key.unit for key, endpoint in keys.items() if endpoint.name == name and key.role == "kvstore"}
        return [name, *(one.name for key, one in keys.items() if key.unit in units and one.name != name)]

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
        values = dict(itertools.pairwise(words))
        if (module := values.get("-m", "")) not in _MODULES:
            return module or " ".join(words)
        key = ProcessKey(_MODULES[module], values.get("--unit", ""), values.get("--model", ""))  # type: ignore[arg-type]
        return self.runtime.display_name(key)


def names_of(runtime: MeshRuntime) -> list[str]:
    """Names of all processes of a mesh."""
    return [*(endpoint.name for endpoint in runtime.endpoints().values()), REDIS]
