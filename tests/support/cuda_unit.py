"""A unit on the fake driver: its kvstore is a process, and so are its workers (`cuda_worker`)."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from muxmesh.config.runtime import MeshRuntime, PreparedModel, ProcessKey
from muxmesh.config.schema import MeshConfig
from muxmesh.internal.v1 import kvstore_pb2, kvstore_pb2_grpc
from muxmesh.rpc.channels import internal_channel
from muxmesh.types import Role
from muxmesh.v1 import mesh_pb2
from tests.support.fake_driver import UUID, device_resources, fake_driver_environment
from tests.support.processes import ended
from tests.support.served_unit import RouterStream

MIB = 1 << 20
LONGEST_WAIT_S = 60.0
KVSTORE = ProcessKey("kvstore", "u")


def cuda_runtime(folder: Path, uuid: str = UUID, weights_bytes: int = 3 * MIB, **unit: Any) -> MeshRuntime:
    """The runtime of a unit `u` on a GPU with one model `m`; no Redis.

    Its weight image is the file `image` in ``folder``; if there is none, it is made, with ``weights_bytes``.
    """
    image = folder / "image"
    if not image.exists():
        image.write_bytes(b"w" * weights_bytes)
    config = {"name": "u", "device": "cuda:0", "kv_pool": "4MiB", "slab": "1MiB", "models": [{"name": "m"}], **unit}
    return MeshRuntime(
        config=MeshConfig.model_validate({"units": [config]}),
        run_dir=folder,
        cache_dir=folder,
        redis_url=f"unix://{folder}/no-redis.sock",
        prepared={"u": {"m": PreparedModel(folder=None, image=image, weights_fingerprint="w")}},
        device_uuids={"u": uuid},
    )


@dataclass(frozen=True)
class WorkerProcess:
    """A process of `cuda_worker` that has attached. ``hello``: its first line."""

    process: Process
    hello: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.hello["worker"])

    async def run(self, command: str, *arguments: Any) -> dict[str, Any]:
        """Lets it run a command; returns what it prints."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, *arguments]).encode() + b"\n")
        return await next_line(self.process)

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()


@dataclass(frozen=True)
class CudaUnit:
    """A kvstore process that serves."""

    runtime: MeshRuntime
    process: Process
    settings: dict[str, str]
    channel: grpc.aio.Channel
    stack: AsyncExitStack
    """Ends with the unit."""

    @property
    def attach_path(self) -> Path:
        return self.runtime.attach_path("u")

    def router(self) -> RouterStream:
        stream = RouterStream(kvstore_pb2_grpc.KvStoreServiceStub(self.channel))
        self.stack.callback(stream.cancel)
        return stream

    def worker_environment(self, role: Role) -> dict[str, str]:
        """The variables of a worker, whose kernels are interpreted."""
        interpreted = {"TRITON_INTERPRET": "1", "FAKE_CUDA_HOST_ACCESS": "1"}
        return {**self.runtime.environment(ProcessKey(role, "u", "m")), **self.settings, **interpreted}

    async def start_worker(self, role: Role, **settings: str) -> WorkerProcess:
        """Starts a worker; its first line may be an error. ``settings`` are added to its environment."""
        arguments = ("-m", "tests.support.cuda_worker", str(self.attach_path), role.value)
        process = await start_python(*arguments, **{**self.worker_environment(role), **settings})
        await self.stack.enter_async_context(ended(process))
        return WorkerProcess(process, await next_line(process))

    async def status(self) -> mesh_pb2.UnitStatus:
        stub = kvstore_pb2_grpc.KvStoreServiceStub(self.channel)
        response: Any = await stub.GetUnitStatus(kvstore_pb2.GetUnitStatusRequest())
        return response.unit  # type: ignore[no-any-return]

    async def until(self, condition: Callable[[mesh_pb2.UnitStatus], bool]) -> mesh_pb2.UnitStatus:
        """Waits until the unit's status meets the condition."""
        async with asyncio.timeout(LONGEST_WAIT_S):
            while not condition(status := await self.status()):
                await asyncio.sleep(0)
        return status

    def resources(self) -> dict[str, int]:
        """What kvstore has open or mapped of the device."""
        return dict(device_resources(self.process.pid))


@asynccontextmanager
async def cuda_unit(folder: Path, settings: dict[str, str] | None = None, **unit: Any) -> AsyncIterator[CudaUnit]:
    """Serves a unit until the block ends. ``settings``: of the fake driver, for all processes of the unit."""
    runtime, settings = cuda_runtime(folder, **unit), settings or {}
    async with AsyncExitStack() as stack:
        process = await start_kvstore(runtime, **settings)
        await stack.enter_async_context(ended(process))
        address = runtime.endpoints()[KVSTORE].address
        channel = await stack.enter_async_context(internal_channel(address))
        await _until_serving(channel, process)
        yield CudaUnit(runtime, process, settings, channel, stack)


async def _until_serving(channel: grpc.aio.Channel, process: Process) -> None:
    """Fails with the errors of the process if it ends instead."""
    stub: Any = kvstore_pb2_grpc.KvStoreServiceStub(channel)
    call = stub.GetUnitStatus(kvstore_pb2.GetUnitStatusRequest(), wait_for_ready=True, timeout=LONGEST_WAIT_S)
    serving, end = asyncio.ensure_future(call), asyncio.ensure_future(process.wait())
    await asyncio.wait((serving, end), return_when=asyncio.FIRST_COMPLETED)
    if end.done():
        serving.cancel()
        assert process.stderr is not None
        raise AssertionError((await process.stderr.read()).decode())
    end.cancel()
    await serving


async def start_kvstore(runtime: MeshRuntime, **settings: str) -> Process:
    """Starts the kvstore of unit `u` on the fake driver."""
    file = runtime.run_dir / "runtime.json"
    runtime.write(file)
    arguments = ("-m", "kvstore", "--runtime", str(file), "--unit", "u", "--parent", str(os.getpid()))
    return await start_python(*arguments, **{**runtime.environment(KVSTORE), **settings})


async def start_python(*arguments: str, **settings: str) -> Process:
    environment = fake_driver_environment(**settings)
    return await asyncio.create_subprocess_exec(
        sys.executable, *arguments, env=environment, stdin=PIPE, stdout=PIPE, stderr=PIPE
    )


async def next_line(process: Process) -> dict[str, Any]:
    """The next line of a worker. Fails with its errors if it has ended."""
    assert process.stdout is not None and process.stderr is not None
    async with asyncio.timeout(LONGEST_WAIT_S):
        line = await process.stdout.readline()
    assert line, (await process.stderr.read()).decode()
    values: dict[str, Any] = json.loads(line)
    return values
