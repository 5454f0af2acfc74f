"""The supervisor of a mesh on this machine: which processes run, and in which order they start and stop."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import logging
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxmesh.clock import Clock
from muxmesh.config.runtime import Endpoint, MeshRuntime, PreparedModel, ProcessKey
from muxmesh.config.schema import MAX_PORT, MeshConfig
from muxmesh.errors import ConfigError
from muxmesh.process_registry import ProcessRegistry
from muxmesh.rpc.channels import internal_channel
from muxmesh.supervisor.redis_server import redis_command, wait_for_redis
from muxmesh.supervisor.supervised_process import ProcessSpec, SupervisedProcess, log_file
from muxmesh.types import Role

READY_TIMEOUT_S = 180.0
"""Long enough to compile kernels on a slow machine."""
_STOP_GRACE_S = 5.0
_ROUTER = "router"

ShowLine = Callable[[str, str], None]


@contextlib.contextmanager
def state_lock(state_dir: Path) -> Iterator[None]:
    """Allows one mesh for each state directory. Raises ConfigError if another one runs."""
    state_dir.mkdir(parents=True, exist_ok=True)
    with (state_dir / "mesh.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ConfigError(
                f"a mesh is already running with state directory {state_dir} (pid {lock.read().strip()}); "
                "stop it, or give another --state-dir"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def free_listen_address(listen: str) -> str:
    """``listen`` with port 0 replaced by a free port. Raises ConfigError if the address cannot be listened on."""
    host, _, port = listen.rpartition(":")
    try:
        if int(port) > MAX_PORT:
            raise ValueError(f"the last port is {MAX_PORT}")
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return f"{host}:{probe.getsockname()[1]}"
    except (OSError, OverflowError, ValueError) as error:
        raise ConfigError(f"cannot listen on {listen}: {error}") from error


def make_runtime(
    config: MeshConfig, prepared: dict[str, PreparedModel], state_dir: Path, cache_dir: Path
) -> MeshRuntime:
    """Places the sockets: under ``state_dir``, or in a short temporary folder if that path is too long.

    Each supervisor has a folder of its own: processes of one that was killed may still be removing their sockets.
    """

    def runtime_in(run_dir: Path) -> MeshRuntime:
        redis_url = config.redis_url or f"unix://{run_dir / 'redis.sock'}"
        return MeshRuntime(config=config, run_dir=run_dir, cache_dir=cache_dir, redis_url=redis_url, prepared=prepared)

    for left_behind in state_dir.glob("run-*"):
        shutil.rmtree(left_behind, ignore_errors=True)
    runtime = runtime_in(state_dir / f"run-{os.getpid()}")
    try:
        runtime.check_socket_paths()
    except ConfigError:
        runtime = runtime_in(Path(tempfile.mkdtemp(prefix="muxmesh-")))
        runtime.check_socket_paths()
    return runtime


class MeshSupervisor:
    """Owns all processes. Invariant: after `stop`, none of them is left."""

    def __init__(self, runtime: MeshRuntime, state_dir: Path, show_line: ShowLine, clock: Clock) -> None:
        self.runtime = runtime
        self._registry = ProcessRegistry(runtime.redis_url, runtime.config.mesh_id, clock)
        logs = state_dir / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self._log_file = log_file(logs / "supervisor.log")
        logging.getLogger("supervisor").addHandler(self._log_file)
        runtime.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        runtime.run_dir.chmod(0o700)
        self._runtime_file = runtime.run_dir / "runtime.json"
        runtime.write(self._runtime_file)
        endpoints = runtime.endpoints()
        stages = [[_redis(runtime, state_dir)]] if runtime.config.redis_url is None else []
        stages.append([self._service(key, endpoints[key]) for key in endpoints if key.role == "kvstore"])
        stages.append([self._service(key, endpoints[key]) for key in endpoints if key.role != "kvstore"])
        self._stages = [
            [SupervisedProcess(spec, logs, clock, show_line, self._registry.count_restart) for spec in stage]
            for stage in stages
        ]

    @property
    def processes(self) -> list[SupervisedProcess]:
        """All of them, in the order in which they start."""
        return [process for stage in self._stages for process in stage]

    async def start(self) -> None:
        """Starts everything and waits until it serves. Raises Unavailable with the last output of what does not."""
        for stage in self._stages:
            for process in stage:
                process.start()
            waiting = [asyncio.create_task(process.wait_ready(READY_TIMEOUT_S)) for process in stage]
            try:
                await asyncio.gather(*waiting)
            finally:
                for task in waiting:
                    task.cancel()

    async def stop(self) -> None:
        """Stops everything: the router first, Redis last."""
        for stage in reversed(self._stages):
            for is_router in (True, False):
                part = [process for process in stage if (process.spec.name == _ROUTER) is is_router]
                await asyncio.gather(*(process.stop(_STOP_GRACE_S) for process in part))
        await self._registry.close()
        logging.getLogger("supervisor").removeHandler(self._log_file)
        self._log_file.close()
        shutil.rmtree(self.runtime.run_dir, ignore_errors=True)

    def _service(self, key: ProcessKey, endpoint: Endpoint) -> ProcessSpec:
        module = f"{key.role.value}_svc" if isinstance(key.role, Role) else key.role
        command = (sys.executable, "-m", module, "--runtime", str(self._runtime_file), "--parent", str(os.getpid()))
        named = [
            text for name, value in (("--unit", key.unit), ("--model", key.model)) if value for text in (name, value)
        ]
        return ProcessSpec(endpoint.name, (*command, *named), functools.partial(wait_until_serving, endpoint.address))


def _redis(runtime: MeshRuntime, state_dir: Path) -> ProcessSpec:
    command = redis_command(Path(runtime.redis_url.removeprefix("unix://")), state_dir)
    return ProcessSpec("redis", command, functools.partial(wait_for_redis, runtime.redis_url))


async def wait_until_serving(address: str) -> None:
    """Returns when the service at ``address`` reports SERVING. Watches, does not poll."""
    async with internal_channel(address) as channel:
        while True:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True)
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for response in watch:
                    if response.status == health_pb2.HealthCheckResponse.SERVING:
                        watch.cancel()
                        return
            await asyncio.sleep(0.05)
