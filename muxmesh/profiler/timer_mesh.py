"""The processes of a profile on this machine: timers, each limited to a share, and the MPS daemons of GPUs.

A share is set before a process starts, as for a worker: each share has a runtime file of its own, in which every worker
has it. Knows no order of cells.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from kvstore.share_proof import ConfiguredShare, ReportedShare, share_problem
from muxmesh.config.model_config import ComputeShare
from muxmesh.config.runtime import MeshRuntime, MpsDaemons, ProcessKey
from muxmesh.config.schema import MeshConfig
from muxmesh.cuda.mps import PIPE_DIRECTORY
from muxmesh.errors import EngineFailed, Unavailable
from muxmesh.placement.measured_cells import Cell
from muxmesh.profiler.profiled_models import ProfiledModel, pool_bytes
from muxmesh.profiler.timer_client import TimerClient, timer_process
from muxmesh.supervisor.mps_checks import wait_for_mps
from muxmesh.types import Role

_MPS_WITHIN_S = 30.0
_STOP_WITHIN_S = 20.0
"""A keeper stops its daemon in order, which takes seconds if a client hangs."""


class TimerMesh:
    """Starts timers for models by the names that a profile gives them. Use it as a context."""

    def __init__(
        self,
        models: Sequence[ProfiledModel],
        cache_dir: Path,
        device_uuids: Mapping[str, str],
        mps_program: Path | None,
        num_sms: int = 0,
    ) -> None:
        """``num_sms``: of the whole GPU, 0 on a CPU."""
        self._models = {model.source: model for model in models}
        self._cache_dir = cache_dir
        self._device_uuids = dict(device_uuids)
        self._mps_program = mps_program
        self._num_sms = num_sms

    async def __aenter__(self) -> TimerMesh:
        """Starts the MPS daemons that the models' units need. Raises Unavailable if one does not answer."""
        self._stack = AsyncExitStack()
        async with self._stack:
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="muxmesh-profile-")))
            on_device = {self._device_uuids.get(model.unit.name): model for model in self._models.values()}
            for model in on_device.values():  # any unit on a GPU names its daemon
                runtime = self._runtime(model, 100, model.unit.slab)
                if runtime.uses_mps(model.unit.name):
                    file = self._write(runtime, model, 100)
                    await self._stack.enter_async_context(_mps_daemon(file, runtime, model.unit.name))
            self._stack = self._stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @asynccontextmanager
    async def open(self, cells: Sequence[Cell], beside: Sequence[int] = ()) -> AsyncIterator[TimerClient]:
        """Starts a timer for ``cells``, of one model and share, whose KV fits its pool.

        ``beside``: shares of the timers that compute beside it and were opened before; where green contexts limit them,
        it has other SMs as far as there are enough.

        Raises EngineFailed if the model cannot be loaded, or the share of the process is not enforced.
        """
        model, share = self._models[cells[0].model], cells[0].share
        runtime = self._runtime(model, share, pool_bytes(model, cells))
        file = self._write(runtime, model, share)
        async with timer_process(file, model.unit.name, model.config.name, share, beside) as timer:
            await self._check_share(runtime, model, share, timer)
            yield timer

    def _write(self, runtime: MeshRuntime, model: ProfiledModel, share: int) -> Path:
        """Writes the file of a process of ``model`` on ``share``; returns its path."""
        path = self._folder / f"{model.unit.name}-{model.config.name}-{share}.json"
        runtime.write(path)
        return path

    def _runtime(self, model: ProfiledModel, share: int, kv_pool: int) -> MeshRuntime:
        limited = model.config.model_copy(update={"compute_share": ComputeShare(prefill=share, decode=share)})
        unit = model.unit.model_copy(update={"models": (limited,), "kv_pool": kv_pool})
        return MeshRuntime(
            config=MeshConfig(units=(unit,)),
            run_dir=self._folder,
            cache_dir=self._cache_dir,
            redis_url="",
            prepared={unit.name: {model.config.name: model.prepared}},
            device_uuids=self._device_uuids,
            mps=self._mps_program and MpsDaemons(program=self._mps_program, log_dir=self._folder / "logs"),
        )

    async def _check_share(self, runtime: MeshRuntime, model: ProfiledModel, share: int, timer: TimerClient) -> None:
        """Raises EngineFailed unless a GPU's driver and daemon confirm the share; see `kvstore.share_proof`."""
        if not model.unit.is_cuda:
            return
        pipe_dir, is_listed = "", False
        if runtime.uses_mps(model.unit.name):
            control = runtime.mps_control(model.unit.name)
            pipe_dir = str(control.pipe_dir)
            try:
                is_listed = any(timer.pid in server.clients for server in await control.servers())
            except Unavailable as error:
                raise EngineFailed(str(error)) from error
        limit = runtime.share_of(ProcessKey(Role.DECODE, model.unit.name, model.config.name))
        configured = ConfiguredShare(limit, self._num_sms, pipe_dir)
        if problem := share_problem(ReportedShare.parse(timer.facts), configured, is_listed):
            raise EngineFailed(f"{model.source} on a share of {share}: {problem}")


@asynccontextmanager
async def _mps_daemon(runtime_file: Path, runtime: MeshRuntime, unit: str) -> AsyncIterator[None]:
    """The MPS daemon of the unit's GPU, which ends with the block. Raises Unavailable if it does not answer."""
    launcher = (sys.executable, "-m", "muxmesh.supervisor.exec_with_parent", str(os.getpid()), sys.executable)
    command = (*launcher, "-m", "muxmesh.supervisor.mps_daemon", "--runtime", str(runtime_file), "--unit", unit)
    process = await asyncio.create_subprocess_exec(*command, start_new_session=True)
    try:
        try:
            async with asyncio.timeout(_MPS_WITHIN_S):
                await wait_for_mps(runtime.mps_control(unit))
        except TimeoutError:
            pipe_dir = runtime.mps_directories(unit)[PIPE_DIRECTORY]
            raise Unavailable(f"no MPS daemon answers in {pipe_dir} after {_MPS_WITHIN_S:g} s") from None
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(_STOP_WITHIN_S):
            await process.wait()
