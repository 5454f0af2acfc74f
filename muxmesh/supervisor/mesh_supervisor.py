"""The supervisor of a mesh on one machine: the processes of the mesh, and the order in which they start and stop.

    start    Redis > MPS daemons > kvstores > workers and routers
    stop     routers > workers > kvstores > MPS daemons > Redis

Knows command lines and health checks. `supervised_process` runs one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

from muxmesh.background_task import end, start_watched
from muxmesh.clock import Clock
from muxmesh.config.runtime import Endpoint, MeshRuntime, MpsDaemons, PreparedModel, ProcessKey
from muxmesh.config.schema import MeshConfig
from muxmesh.cuda.mps import LOG_DIRECTORY, MpsControl
from muxmesh.errors import ConfigError, Unavailable
from muxmesh.file_lock import LockHeldError, file_lock
from muxmesh.log_format import formatter_of
from muxmesh.process_registry import ProcessRegistry
from muxmesh.rpc.bindable_port import bindable_port
from muxmesh.supervisor.health_probe import HealthProbe, wait_until_serving
from muxmesh.supervisor.liveness import CHECK_EVERY_S, FENCED_EXTRA_CHECKS, MAX_STARTING_CHECKS
from muxmesh.supervisor.log_file import WITH_TIME, LogFile
from muxmesh.supervisor.mps_checks import check_mps, wait_for_mps
from muxmesh.supervisor.mps_leftovers import end_leftovers
from muxmesh.supervisor.redis_server import RedisProbe, redis_command, wait_for_redis
from muxmesh.supervisor.run_folder import (
    create_run_folder,
    delete_earlier_run_folders,
    delete_run_folder,
    free_run_folder,
    temporary_run_folder,
)
from muxmesh.supervisor.supervised_process import ProcessSpec, SupervisedProcess
from muxmesh.supervisor.tenant_secret import tenant_secret
from muxmesh.types import Role

_log = logging.getLogger("supervisor")

READY_TIMEOUT_S = MAX_STARTING_CHECKS * CHECK_EVERY_S
"""Includes the time to compile kernels on a slow machine."""
_STOP_GRACE_S = 5.0
_RETRY_S = 1.0
_NO_METRICS = {"MUXMESH_METRICS": ""}
"""A port that the environment of the supervisor names is not for each of its services."""
_CLIENT_FACING_ROLES = frozenset({"router"})

ShowLine = Callable[[str, str], None]
"""Called with the name of a process and a line of its output."""


@contextlib.contextmanager
def state_lock(state_dir: Path) -> Iterator[None]:
    """Holds the lock on a state directory while the block runs.

    Raises ConfigError if another mesh holds it or the directory cannot be written.
    """
    with contextlib.ExitStack() as held:
        try:
            state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            held.enter_context(file_lock(state_dir / "mesh.lock"))
        except LockHeldError as error:
            raise ConfigError(
                f"a mesh is already running with state directory {state_dir} (pid {error.pid}); "
                "stop it, or give another --state-dir"
            ) from None
        except OSError as error:
            raise ConfigError(f"state directory {state_dir} cannot be written: {error.strerror}") from error
        yield


def free_listen_address(listen: str) -> str:
    """Replaces port 0 in ``listen`` by a free port. Raises ConfigError if the address is invalid or in use."""
    return f"{listen.rpartition(':')[0]}:{bindable_port(listen)}"


def make_runtime(
    config: MeshConfig,
    prepared: dict[str, dict[str, PreparedModel]],
    state_dir: Path,
    cache_dir: Path,
    device_uuids: dict[str, str] | None = None,
    mps_program: Path | None = None,
) -> MeshRuntime:
    """Chooses the folder of the sockets: under ``state_dir``, or a temporary one if that path is too long.

    ``device_uuids``: see `MeshRuntime`. ``mps_program``: the control program of MPS, if units may use it. Deletes the
    folders of earlier supervisors. Raises ConfigError if names of units or models make the socket paths invalid.
    """
    secret = tenant_secret(state_dir)

    def runtime_in(run_dir: Path) -> MeshRuntime:
        redis_url = config.redis_url or f"unix://{run_dir / 'redis.sock'}"
        return MeshRuntime(
            config=config,
            run_dir=run_dir,
            cache_dir=cache_dir,
            redis_url=redis_url,
            prepared=prepared,
            has_supervisor=True,
            device_uuids=device_uuids or {},
            mps=mps_program and MpsDaemons(program=mps_program, log_dir=state_dir / "logs"),
            tenant_secret=secret,
        )

    delete_earlier_run_folders(state_dir)
    runtime = runtime_in(free_run_folder(state_dir))
    try:
        runtime.check_socket_paths()
    except ConfigError:
        runtime = runtime_in(temporary_run_folder(state_dir))
        try:
            runtime.check_socket_paths()
        except ConfigError:
            delete_run_folder(runtime.run_dir, state_dir)
            raise
    return runtime


class MeshSupervisor:
    """Owns all processes of a mesh. Invariant: none of them runs after `stop`, nor a server of their MPS daemons."""

    def __init__(self, runtime: MeshRuntime, state_dir: Path, show_line: ShowLine, clock: Clock) -> None:
        self.runtime = runtime
        self._state_dir = state_dir
        self._keeps_data = runtime.config.access.mode == "keys"  # of the tenants; all else is of this run only
        self._probes: dict[str, HealthProbe | RedisProbe] = {}
        """By name of the process."""
        self._mps: list[MpsControl] = []
        self._metrics = AsyncExitStack()
        self.metrics_address = ""
        """HOST:PORT of the HTTP endpoint, once the mesh starts; empty if there is none."""
        stages = self._specs()
        logs = state_dir / "logs"
        try:
            logs.mkdir(parents=True, exist_ok=True)
            self._write_run_folder()
        except OSError as error:
            delete_run_folder(runtime.run_dir, state_dir)
            raise ConfigError(f"{state_dir}: cannot be written: {error.strerror}") from error
        log_format = runtime.config.log_format or "text"
        formatter = formatter_of(log_format, "supervisor") if log_format == "json" else WITH_TIME
        self._log_file = LogFile(logs / "supervisor.log", formatter)
        logging.getLogger("supervisor").addHandler(self._log_file)
        self._registry = ProcessRegistry(runtime.redis_url, runtime.config.mesh_id, clock)
        self._restarted = asyncio.Event()
        self._restarted.set()  # an own Redis may have the counts of an earlier supervisor
        self._new_process = functools.partial(
            SupervisedProcess,
            logs=logs,
            clock=clock,
            show_line=show_line,
            on_restart=self._before_restart,
            log_format=log_format,
        )
        self._stages = [[self._new_process(spec) for spec in stage] for stage in stages]
        self._counting = start_watched(self._publish_restarts(), "restart counts")

    @property
    def processes(self) -> list[SupervisedProcess]:
        """All processes, in the order in which they start."""
        return [process for stage in self._stages for process in stage]

    async def start(self) -> None:
        """Starts all processes and waits until they serve.

        Raises Unavailable with the output of one that does not; ConfigError if the address of metrics is in use.
        """
        await self._serve_metrics()
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
        """Stops all processes, those that face clients first and Redis last. Deletes the folder of the sockets."""
        for stage in reversed(self._stages):
            for faces_clients in (True, False):
                part = [process for process in stage if process.spec.faces_clients is faces_clients]
                await asyncio.gather(*(process.stop(_STOP_GRACE_S) for process in part))
        for control in self._mps:
            with contextlib.suppress(Unavailable):
                await end_leftovers(control)  # of a daemon that had to be killed
        await end(self._counting)
        await self._metrics.aclose()
        for probe in self._probes.values():
            await probe.close()
        await self._registry.close()
        logging.getLogger("supervisor").removeHandler(self._log_file)
        self._log_file.close()
        delete_run_folder(self.runtime.run_dir, self._state_dir)

    def set_runtime(self, runtime: MeshRuntime) -> None:
        """Replaces the runtime file: processes that start from now on read this one.

        Raises Unavailable if it cannot be written: nothing has changed then.
        """
        try:
            runtime.write(runtime.path)
        except OSError as error:
            raise Unavailable(f"{runtime.path} cannot be written: {error.strerror}") from error
        self.runtime = runtime

    async def start_workers(self, unit: str, model: str) -> None:
        """Starts the workers of a model that the runtime file names now, and waits until they serve.

        Raises Unavailable with the output of one that does not; then they are stopped again.
        """
        endpoints = self.runtime.endpoints()
        keys = [ProcessKey(role, unit, model) for role in Role]
        specs = [self._service(key, endpoints[key]) for key in keys]
        started = [self._new_process(spec) for spec in specs]
        self._stages[-1].extend(started)
        self._restarted.set()  # workers of these names may have been counted before their model was unloaded
        for process in started:
            process.start()
        try:
            await asyncio.gather(*(process.wait_ready(READY_TIMEOUT_S) for process in started))
        except BaseException:
            await self.stop_processes(spec.name for spec in specs)
            raise

    async def stop_processes(self, names: Iterable[str]) -> None:
        """Stops processes of these names for good."""
        names = set(names)
        ended = [process for process in self._stages[-1] if process.spec.name in names]
        await asyncio.gather(*(process.stop(_STOP_GRACE_S) for process in ended))
        self._stages[-1] = [process for process in self._stages[-1] if process not in ended]
        for process in ended:
            if (probe := self._probes.pop(process.spec.name, None)) is not None:
                await probe.close()

    async def _serve_metrics(self) -> None:
        config = self.runtime.config.metrics
        if config is None:
            return
        from muxmesh.supervisor.mesh_metrics import MeshMetrics, ProcessCount  # noqa: PLC0415 - only if they are on

        def endpoints() -> dict[str, str]:
            return {one.name: self.runtime.metrics_address(one.name) for one in self.runtime.endpoints().values()}

        def processes() -> list[ProcessCount]:
            return [ProcessCount(one.spec.name, one.pid is not None, one.num_restarts) for one in self.processes]

        serving = MeshMetrics(endpoints, processes).serving(config.listen)
        self.metrics_address = await self._metrics.enter_async_context(serving)

    def _write_run_folder(self) -> None:
        """Writes the folder of the sockets with the runtime file, as far as they do not exist. Raises OSError."""
        create_run_folder(self.runtime.run_dir)
        if not self.runtime.path.exists():
            self.runtime.write(self.runtime.path)

    def _before_restart(self) -> None:
        """The folder may have been deleted, by a cleaner of temporary files for example: no process could start."""
        self._restarted.set()
        try:
            self._write_run_folder()
        except OSError as error:
            _log.warning("%s cannot be written: %s", self.runtime.run_dir, error.strerror)

    async def _publish_restarts(self) -> None:
        """Writes the counts after each restart. They are lost when Redis restarts, which is a restart too."""
        while True:
            await self._restarted.wait()
            self._restarted.clear()
            counts = {process.spec.name: process.num_restarts for process in self.processes}
            if not await self._registry.set_restarts(counts):
                self._restarted.set()
                await asyncio.sleep(_RETRY_S)

    def _specs(self) -> list[list[ProcessSpec]]:
        """The processes of each stage, in the order in which they start. Raises ConfigError if there is no Redis."""
        endpoints = self.runtime.endpoints()
        redis = [self._redis()] if self.runtime.config.redis_url is None else []
        units = [unit.name for unit in self.runtime.config.units if self.runtime.uses_mps(unit.name)]
        units_on = {self.runtime.device_uuids[unit]: unit for unit in units}
        daemons = [self._mps_daemon(unit) for unit in units_on.values()]
        kvstores = [self._service(key, endpoints[key]) for key in endpoints if key.role == "kvstore"]
        others = [self._service(key, endpoints[key]) for key in endpoints if key.role != "kvstore"]
        return [stage for stage in (redis, daemons, kvstores, others) if stage]

    def _service(self, key: ProcessKey, endpoint: Endpoint) -> ProcessSpec:
        module = f"{key.role.value}_svc" if isinstance(key.role, Role) else key.role
        named = [
            text for name, value in (("--unit", key.unit), ("--model", key.model)) if value for text in (name, value)
        ]
        if key.role == "router":
            named += ["--name", endpoint.name]
        probe = self._probes[endpoint.name] = HealthProbe(endpoint.address)
        if self.runtime.config.metrics is not None:
            named += ["--metrics", self.runtime.metrics_address(endpoint.name)]
        return ProcessSpec(
            endpoint.name,
            self._command(module, *named),
            functools.partial(wait_until_serving, endpoint.address),
            probe.ask,
            {**_NO_METRICS, **self.runtime.environment(key)},
            faces_clients=key.role in _CLIENT_FACING_ROLES,
            extra_checks=FENCED_EXTRA_CHECKS if isinstance(key.role, Role) and self.runtime.uses_mps(key.unit) else 0,
        )

    def _command(self, module: str, *arguments: str) -> tuple[str, ...]:
        parent = str(os.getpid())
        return (sys.executable, "-m", module, "--runtime", str(self.runtime.path), "--parent", parent, *arguments)

    def _mps_daemon(self, unit: str) -> ProcessSpec:
        """The daemon of the unit's GPU, which serves the other units on that GPU too."""
        control = self.runtime.mps_control(unit)
        self._mps.append(control)
        return ProcessSpec(
            control.pipe_dir.name,
            self._command("muxmesh.supervisor.mps_daemon", "--unit", unit),
            functools.partial(wait_for_mps, control),
            functools.partial(check_mps, control),
            hint=f"see {control.environment[LOG_DIRECTORY]}, or set mps: off",
            quit=control.quit,
        )

    def _redis(self) -> ProcessSpec:
        url = self.runtime.redis_url
        command = redis_command(Path(url.removeprefix("unix://")), self._state_dir, self._keeps_data)
        probe = self._probes["redis"] = RedisProbe(url)
        return ProcessSpec("redis", command, functools.partial(wait_for_redis, url), probe.ask)
