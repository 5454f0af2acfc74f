"""A router as its process runs it, with stand-ins for the processes of its units. Redis is unreachable, or real."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxmesh.clock import SystemClock
from muxmesh.config.runtime import MeshRuntime, PreparedModel, ProcessKey
from muxmesh.config.schema import MeshConfig
from muxmesh.internal.v1 import kvstore_pb2, prefill_pb2
from muxmesh.lifecycle import Stop
from muxmesh.metrics.monitor import Monitor
from muxmesh.process_registry import ProcessRegistry
from muxmesh.rpc import convert
from muxmesh.rpc.channels import internal_channel
from muxmesh.supervisor.mesh_supervisor import free_listen_address
from muxmesh.types import Finish, FinishReason, LeaseRef
from muxmesh.v1 import inference_pb2, inference_pb2_grpc, mesh_pb2, mesh_pb2_grpc
from router.admission_client import UnitAdmission
from router.app import DRAIN_S, serve
from tests.support.fake_unit import FakeKvStore, FakeWorker, serving

NOT_SERVING, SERVING = health_pb2.HealthCheckResponse.NOT_SERVING, health_pb2.HealthCheckResponse.SERVING


def runtime_in(folder: Path, redis_url: str = "unix:///nowhere/redis.sock") -> MeshRuntime:
    """Two units: "u0" serves m, "u1" serves m and n."""
    model = {"engine": "sim", "default_max_new_tokens": 5}
    units = [
        {"name": "u0", "cores": [0], "models": [{"name": "m", **model}]},
        {"name": "u1", "cores": [1], "models": [{"name": "m", **model}, {"name": "n", **model}]},
    ]
    config = MeshConfig.model_validate({"listen": free_listen_address("127.0.0.1:0"), "units": units})
    sim = PreparedModel(folder=None, image=None, weights_fingerprint="sim")
    prepared = {"u0": {"m": sim}, "u1": {"m": sim, "n": sim}}
    return MeshRuntime(config=config, run_dir=folder, cache_dir=folder, redis_url=redis_url, prepared=prepared)


@dataclass
class Setup:
    runtime: MeshRuntime
    kvstores: dict[str, FakeKvStore]
    stop: Stop
    running: asyncio.Task[bool]
    health: health_pb2_grpc.HealthAsyncStub
    inference: inference_pb2_grpc.InferenceAsyncStub
    mesh: mesh_pb2_grpc.MeshAsyncStub
    _servers: AsyncExitStack

    async def start_unit(self, name: str) -> None:
        address = self.runtime.endpoints()[ProcessKey("kvstore", name)].address
        socket = Path(address.removeprefix("unix:"))
        await self._servers.enter_async_context(serving(socket, self.kvstores[name].services))

    async def until_serving(self) -> None:
        async with asyncio.timeout(20):
            while await self.status() is not SERVING:
                pass

    async def status(self, service: str = "") -> health_pb2.HealthCheckResponse.ServingStatus.ValueType:
        request = health_pb2.HealthCheckRequest(service=service)
        return (await self.health.Check(request, wait_for_ready=True)).status


@asynccontextmanager
async def router(runtime: MeshRuntime, name: str = "router", drain_s: float = DRAIN_S) -> AsyncIterator[Setup]:
    """A router that has started, without its units. It is stopped at the end, unless the test has stopped it."""
    stop = Stop()
    running = asyncio.create_task(
        stop.run(functools.partial(serve, runtime, monitor=Monitor(), name=name, drain_s=drain_s))
    )
    async with internal_channel(runtime.config.listen) as channel, AsyncExitStack() as servers:
        stubs = (
            health_pb2_grpc.HealthStub(channel),
            inference_pb2_grpc.InferenceStub(channel),
            mesh_pb2_grpc.MeshStub(channel),
        )
        setup = Setup(
            runtime, {unit.name: FakeKvStore() for unit in runtime.config.units}, stop, running, *stubs, servers
        )
        try:
            yield setup
        finally:
            stop.set()
            await asyncio.wait_for(running, 20)


async def test_a_router_serves_once_every_unit_is_connected(tmp_path: Path) -> None:
    async with router(runtime_in(tmp_path)) as setup:
        assert await setup.status() == NOT_SERVING
        await setup.start_unit("u0")
        await (await setup.kvstores["u0"].stream()).next("hello")
        assert await setup.status() == NOT_SERVING
        await setup.start_unit("u1")
        await setup.until_serving()
        for service in ("muxmesh.v1.Inference", "muxmesh.v1.Mesh"):
            assert await setup.status(service) == SERVING


async def test_each_router_introduces_itself_to_its_units_by_a_name_of_its_own(tmp_path: Path) -> None:
    names = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        async with router(runtime_in(folder)) as setup:
            for unit in setup.kvstores:
                await setup.start_unit(unit)
                names.append((await (await setup.kvstores[unit].stream()).next("hello")).router)
    assert names[0] == names[1] != names[2] == names[3]


async def test_a_request_passes_from_the_public_api_through_a_unit_to_a_worker_and_back(tmp_path: Path) -> None:
    worker = FakeWorker()
    async with router(runtime_in(tmp_path)) as setup, serving(tmp_path / "w.sock", worker.services) as address:
        for unit in setup.kvstores:
            await setup.start_unit(unit)
        call = setup.inference.Generate(inference_pb2.GenerateRequest(model="n", text="hello"), wait_for_ready=True)
        stream = await setup.kvstores["u1"].stream()
        await stream.next("hello")
        offer = await stream.next("offer")
        assert (offer.model, offer.demand.max_tokens) == ("n", 10)
        reference = kvstore_pb2.WorkerRef(name="w.1", address=address)
        lease = convert.ref_to_wire(LeaseRef(7, 1))
        stream.send(
            credit=kvstore_pb2.Credit(entry_id=offer.entry_id, lease=lease, prefill=reference, decode=reference)
        )
        prefill, _ = await worker.calls()
        finish = convert.finish_to_wire(Finish(FinishReason.EOS, 0))
        prefill.respond(prefill_pb2.PrefillResponse(token_ids=[0], finish=finish))
        assert (await call).outputs.finish_info.eos_token_id == 0
        assert await stream.next("return_credit") == lease


async def refusal(channel: grpc.aio.Channel) -> grpc.StatusCode:
    """The status of a call once the server has stopped to accept them; see `MeshServer.stop` for CANCELLED."""
    async with asyncio.timeout(20):
        while True:
            try:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.CANCELLED:
                    return error.code()


async def test_a_router_that_is_stopped_refuses_new_calls_and_drains_those_that_run(tmp_path: Path) -> None:
    worker = FakeWorker()
    runtime = runtime_in(tmp_path)
    async with (
        router(runtime, drain_s=60) as setup,
        serving(tmp_path / "w.sock", worker.services) as address,
        internal_channel(runtime.config.listen) as later,
    ):
        for unit in setup.kvstores:
            await setup.start_unit(unit)
        call = setup.inference.Generate(inference_pb2.GenerateRequest(model="n", text="hello"), wait_for_ready=True)
        stream = await setup.kvstores["u1"].stream()
        await stream.next("hello")
        offer = await stream.next("offer")
        setup.stop.set()
        assert await refusal(later) is grpc.StatusCode.UNAVAILABLE
        reference = kvstore_pb2.WorkerRef(name="w.1", address=address)
        lease = convert.ref_to_wire(LeaseRef(7, 1))
        stream.send(
            credit=kvstore_pb2.Credit(entry_id=offer.entry_id, lease=lease, prefill=reference, decode=reference)
        )
        prefill, _ = await worker.calls()
        assert not setup.running.done()
        prefill.respond(
            prefill_pb2.PrefillResponse(token_ids=[0], finish=convert.finish_to_wire(Finish(FinishReason.EOS, 0)))
        )
        assert (await call).outputs.finish_info.eos_token_id == 0


async def test_status_reports_both_units_and_the_missing_redis(tmp_path: Path) -> None:
    async with router(runtime_in(tmp_path)) as setup:
        for name, kvstore in setup.kvstores.items():
            unit = mesh_pb2.UnitStatus(unit=name, connected=True)
            kvstore.status = kvstore_pb2.GetUnitStatusResponse(unit=unit)
            await setup.start_unit(name)
        await setup.until_serving()
        status = await setup.mesh.GetStatus(mesh_pb2.GetStatusRequest())
        assert [(unit.unit, unit.connected) for unit in status.units] == [("u0", True), ("u1", True)]
        assert [model.model for model in status.models] == ["m", "n"]
        assert (status.redis_connected, status.order_policy) == (False, "srtf-aged")


async def test_a_router_is_registered_while_it_serves(tmp_path: Path, redis_url: str) -> None:
    registry = ProcessRegistry(redis_url, "default", SystemClock())
    runtime = runtime_in(tmp_path, redis_url)
    async with router(runtime) as setup:
        assert await registry.address_of("router") is None
        for unit in setup.kvstores:
            await setup.start_unit(unit)
        async with asyncio.timeout(20):
            while (address := await registry.address_of("router")) is None:
                pass
        assert address == runtime.config.listen
    assert await registry.address_of("router") is None
    await registry.close()


async def test_two_routers_beside_each_other_are_registered_and_serve_on_sockets_of_their_own(
    tmp_path: Path, redis_url: str
) -> None:
    registry = ProcessRegistry(redis_url, "default", SystemClock())
    runtime = runtime_in(tmp_path, redis_url)
    other = runtime.with_listen(free_listen_address("127.0.0.1:0"))
    async with router(runtime, "router-a") as one, router(other, "router-b") as two:
        for unit in one.kvstores:
            await one.start_unit(unit)
        await one.until_serving()
        await two.until_serving()
        async with asyncio.timeout(20):
            while len(found := await registry.processes() or []) < 2:
                pass
        assert {record.name: record.address for record, _ in found} == {
            "router-a": runtime.config.listen,
            "router-b": other.config.listen,
        }
        for name in ("router-a", "router-b"):
            async with internal_channel(f"unix:{tmp_path}/{name}.sock") as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                assert (await stub.Check(health_pb2.HealthCheckRequest())).status is SERVING
    await registry.close()


async def test_a_router_that_is_stopped_while_it_starts_ends_at_once(tmp_path: Path) -> None:
    async with router(runtime_in(tmp_path)) as setup:
        await setup.status()
        setup.stop.set()
        assert await asyncio.wait_for(setup.running, 20) is False
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await setup.health.Check(health_pb2.HealthCheckRequest())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_router_that_serves_ends_when_it_is_stopped(tmp_path: Path) -> None:
    async with router(runtime_in(tmp_path)) as setup:
        for unit in setup.kvstores:
            await setup.start_unit(unit)
        await setup.until_serving()
        setup.stop.set()
        assert await asyncio.wait_for(setup.running, 20) is True


async def test_a_router_whose_admission_fails_by_a_bug_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def has_a_bug(self: UnitAdmission, costs: kvstore_pb2.UnitCosts) -> None:
        raise BufferError("a bug")

    async with router(runtime_in(tmp_path)) as setup:
        for unit in setup.kvstores:
            await setup.start_unit(unit)
        await setup.until_serving()
        stream = await setup.kvstores["u1"].stream()
        monkeypatch.setattr(UnitAdmission, "_on_costs", has_a_bug)
        stream.send(costs=kvstore_pb2.UnitCosts())
        assert await asyncio.wait_for(asyncio.shield(setup.running), 20), "the router has stopped by itself"
    assert "giving up: the task admission to u1 failed: BufferError: a bug" in caplog.text
