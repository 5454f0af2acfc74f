"""The Mesh service on a real server, with a real kvstore server, process registry and Redis."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from muxmesh import __version__
from muxmesh.clock import ManualClock
from muxmesh.config.slo_config import SloConfig
from muxmesh.engine.api import Tokens
from muxmesh.errors import InternalError, Overloaded, Unavailable
from muxmesh.internal.v1 import kvstore_pb2, kvstore_pb2_grpc
from muxmesh.models.sampling_defaults import SamplingDefaults
from muxmesh.process_registry import ProcessRegistry
from muxmesh.rpc.channels import internal_channel
from muxmesh.scheduling_policy import FCFS
from muxmesh.slo import Verdict
from muxmesh.types import EngineRequest
from muxmesh.v1 import mesh_pb2, mesh_pb2_grpc
from router.api.mesh_service import MeshService
from router.attempt import Prefilled
from router.generation import GenerationRequest, TextPrompt
from router.request_record import RequestRecord
from tests.support.fake_unit import FakeKvStore, serving
from tests.support.pipeline_parts import (
    EOS,
    PipelineParts,
    Script,
    Step,
    pipeline_parts,
    served_model,
    until,
    writes,
)

SERVICE = mesh_pb2.DESCRIPTOR.services_by_name["Mesh"]
NO_REDIS = "unix:///nowhere/redis.sock"
TOP_K = SamplingDefaults(top_k=20)
SLO = SloConfig(ttft_s=0.5)


@dataclass
class Setup:
    parts: PipelineParts
    kvstore: FakeKvStore
    stub: mesh_pb2_grpc.MeshAsyncStub

    async def status(self) -> mesh_pb2.GetStatusResponse:
        return await self.stub.GetStatus(mesh_pb2.GetStatusRequest())


@asynccontextmanager
async def service(
    tmp_path: Path, script: Script | None = None, redis_url: str = NO_REDIS, has_kvstore: bool = True
) -> AsyncIterator[Setup]:
    kvstore, models = (
        FakeKvStore(),
        (served_model(), served_model("n", engine="sim", max_model_len=50, defaults=TOP_K, slo=SLO)),
    )
    async with (
        serving(tmp_path / ("kv.sock" if has_kvstore else "another.sock"), kvstore.services),
        internal_channel(f"unix:{tmp_path}/kv.sock") as unit,
        pipeline_parts(script or writes("x"), *models, kvstore=kvstore_pb2_grpc.KvStoreServiceStub(unit)) as parts,
    ):
        registry = ProcessRegistry(redis_url, "mesh", ManualClock(1000.0))
        served = MeshService(
            parts.models, parts.units, parts.pipeline, parts.forecaster, registry, FCFS, parts.metrics, parts.clock
        )
        add = functools.partial(mesh_pb2_grpc.add_MeshServicer_to_server, served)
        async with serving(tmp_path / "r.sock", {SERVICE: add}) as address, internal_channel(address) as channel:
            yield Setup(parts, kvstore, mesh_pb2_grpc.MeshStub(channel))
        await registry.close()


async def test_model_info_has_what_a_client_needs_to_know_of_a_model(tmp_path: Path) -> None:
    async with service(tmp_path) as setup:
        listed = (await setup.stub.ListModels(mesh_pb2.ListModelsRequest())).models
        one = (await setup.stub.GetModelInfo(mesh_pb2.GetModelInfoRequest(model="n"))).model
    assert [model.name for model in listed] == ["m", "n"]
    assert one == listed[1]
    assert listed[1] == mesh_pb2.ModelInfo(
        name="n",
        architecture="sim",
        engine="sim",
        unit="u",
        max_model_len=50,
        default_max_new_tokens=20,
        vocab_size=259,
        eos_token_ids=[EOS],
        has_chat_template=True,
        kv_bytes_per_token=2 * 2 * 1 * 32 * 4,  # K and V, layers, heads, head size, bytes
        dtype="float32",
        sampling_defaults=mesh_pb2.SamplingDefaults(top_k=20),
        slo=mesh_pb2.Slo(ttft_s=0.5),
    )


async def test_models_that_come_and_go_are_listed_as_they_are(tmp_path: Path) -> None:
    async with service(tmp_path) as setup:
        setup.parts.models.remove("m")
        setup.parts.models.add(served_model("o"))
        listed = (await setup.stub.ListModels(mesh_pb2.ListModelsRequest())).models
        assert [model.name for model in listed] == ["n", "o"]
        with pytest.raises(grpc.aio.AioRpcError, match="model: 'm' is not served; served: n, o") as caught:
            await setup.stub.GetModelInfo(mesh_pb2.GetModelInfoRequest(model="m"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_unit_s_own_status_is_passed_on(tmp_path: Path) -> None:
    async with service(tmp_path) as setup:
        unit = mesh_pb2.UnitStatus(unit="u", device="cpu", connected=True, pool=mesh_pb2.PoolStatus(num_slabs=3))
        setup.kvstore.status = kvstore_pb2.GetUnitStatusResponse(unit=unit)
        status = await setup.status()
    assert list(status.units) == [unit]
    assert (status.version, status.order_policy) == (__version__, "fcfs")


async def test_a_unit_whose_kvstore_does_not_listen_is_not_connected(tmp_path: Path) -> None:
    async with service(tmp_path, has_kvstore=False) as setup:
        status = await setup.status()
    assert list(status.units) == [mesh_pb2.UnitStatus(unit="u", connected=False)]
    assert [model.model for model in status.models] == ["m", "n"], "the router's own state is reported all the same"


async def test_a_kvstore_that_is_ending_is_not_connected(tmp_path: Path) -> None:
    async with service(tmp_path) as setup:
        setup.kvstore.status = Unavailable("ending")
        assert not (await setup.status()).units[0].connected


@pytest.mark.parametrize("error", [InternalError("block 7 is free and leased"), Overloaded("too many calls")])
async def test_a_failed_integrity_check_is_not_hidden(tmp_path: Path, error: Any) -> None:
    async with service(tmp_path) as setup:
        setup.kvstore.status = error
        with pytest.raises(grpc.aio.AioRpcError, match=str(error)):
            await setup.status()


async def test_processes_are_those_of_the_registry(tmp_path: Path, redis_url: str) -> None:
    other = ProcessRegistry(redis_url, "mesh", ManualClock(1000.0))
    async with service(tmp_path, redis_url=redis_url) as setup:
        empty = await setup.status()
        assert empty.redis_connected and list(empty.processes) == []
        assert await other.set_restarts({"router": 1})
        async with other.registered("router", "127.0.0.1:1"), asyncio.timeout(20):
            while not (status := await setup.status()).processes:
                pass
    assert list(status.processes) == [
        mesh_pb2.ProcessStatus(
            name="router", pid=os.getpid(), address="127.0.0.1:1", started_at_unix_s=1000.0, num_restarts=1
        )
    ]


async def test_without_redis_the_status_says_so(tmp_path: Path) -> None:
    async with service(tmp_path) as setup:
        status = await setup.status()
    assert not status.redis_connected and list(status.processes) == []


async def test_requests_are_counted_as_waiting_or_running_and_then_as_finished_or_aborted(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    def script(request: EngineRequest) -> Iterable[Step]:
        return [Prefilled(0), Tokens(0, (70,)), go_on, *list(writes("ab")(request))[2:]]

    async with service(tmp_path, script) as setup:
        parts = setup.parts

        async def run(num_sequences: int) -> None:
            request = GenerationRequest("m", TextPrompt("hello"), num_sequences=num_sequences)
            _ = [delta async for delta in await parts.pipeline.start(request, RequestRecord("r", 100.0))]

        parts.admission.open.clear()
        running = asyncio.create_task(run(3))
        counters = parts.pipeline.counters["m"]
        await until(lambda: counters.prompt_tokens == 5 and parts.pipeline.num_waiting("m") == 3)
        assert counts((await setup.status()).models[0]) == (3, 0, 0, 0, 5, 0)
        parts.admission.open.set()
        await until(lambda: counters.output_tokens == 3)
        aborted = asyncio.create_task(run(1))
        await until(lambda: counters.output_tokens == 4)
        assert counts((await setup.status()).models[0]) == (0, 4, 0, 0, 10, 4)
        aborted.cancel()
        await asyncio.gather(aborted, return_exceptions=True)
        go_on.set()
        await running
        first, other = (await setup.status()).models
    assert counts(first) == (0, 0, 1, 1, 10, 7)
    assert counts(other) == (0, 0, 0, 0, 0, 0)
    assert not first.HasField("slo")
    assert other.slo == mesh_pb2.SloStatus(total=mesh_pb2.SloTally(), recent=mesh_pb2.SloTally(), window_s=60)
    assert not first.HasField("prediction_tau") and first.predictions_used


async def test_the_requests_that_met_their_slo_are_counted_since_the_start_and_recently(tmp_path: Path) -> None:
    async with service(tmp_path) as setup:
        counted, clock = setup.parts.metrics.of("n").slo, setup.parts.clock
        counted.add(Verdict(ttft=True, tpot=False, e2el=True), clock.monotonic_s())
        clock.advance(90.0)
        counted.add(Verdict(ttft=True, tpot=True, e2el=True), clock.monotonic_s())
        slo = (await setup.status()).models[1].slo
    assert slo.total == mesh_pb2.SloTally(num_requests=2, num_met=1, num_ttft_met=2, num_tpot_met=1, num_e2el_met=2)
    assert slo.recent == mesh_pb2.SloTally(num_requests=1, num_met=1, num_ttft_met=1, num_tpot_met=1, num_e2el_met=1)


def counts(status: mesh_pb2.RouterModelStatus) -> tuple[int, ...]:
    return (
        status.num_requests_waiting,
        status.num_requests_running,
        status.num_requests_finished,
        status.num_requests_aborted,
        status.prompt_tokens,
        status.output_tokens,
    )


@pytest.mark.parametrize("method", [method.name for method in SERVICE.methods])
async def test_an_unknown_field_of_a_request_is_refused(tmp_path: Path, method: str) -> None:
    request = getattr(mesh_pb2, f"{method}Request").FromString(b"\xf8\x3f\x01")  # field 1023, the number 1
    async with service(tmp_path) as setup:
        with pytest.raises(grpc.aio.AioRpcError, match=r"\(number 1023\): is a field that this mesh does not know"):
            await getattr(setup.stub, method)(request)


async def test_an_empty_name_is_the_only_model(tmp_path: Path) -> None:
    async with service(tmp_path) as setup:
        with pytest.raises(
            grpc.aio.AioRpcError, match="model: is needed, because the mesh serves several; one of: m, n"
        ):
            await setup.stub.GetModelInfo(mesh_pb2.GetModelInfoRequest())
        setup.parts.models.remove("m")
        assert (await setup.stub.GetModelInfo(mesh_pb2.GetModelInfoRequest())).model.name == "n"
