"""Commands to a unit whose workers attach over its socket, and whose engines sleep and wake in this process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from kvstore.model_service import ModelService, PlacedModels
from kvstore.model_states import AwakeLimits, ModelState
from kvstore.worker_slots import EngineState
from muxmesh.background_task import background
from muxmesh.clock import SystemClock
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import UnitConfig
from muxmesh.errors import InvalidRequest, ModelNotFound, RequestAborted, Unauthenticated
from muxmesh.internal.v1 import kvstore_pb2, kvstore_pb2_grpc
from muxmesh.rpc.bindable_port import bindable_port
from muxmesh.rpc.status_codes import response_of
from tests.kvstore.small_unit import make_unit, queued
from tests.support.engines import running_engine
from tests.support.served_unit import ServedUnit, read_model, served
from worker.attachment import Attachment
from worker.worker_process import follow_commands

LONG_S = 20.0


async def command(unit: ServedUnit, name: str, **request: Any) -> None:
    stub = kvstore_pb2_grpc.UnitModelServiceStub(unit.channel)
    kind = getattr(kvstore_pb2, f"{name}Request")
    await response_of(getattr(stub, name)(kind(**request), timeout=LONG_S))


@asynccontextmanager
async def obeying(*attachments: Attachment) -> AsyncIterator[None]:
    """The workers have engines, which do what the unit tells them."""
    async with AsyncExitStack() as stack:
        for attachment in attachments:
            engine = await stack.enter_async_context(running_engine())
            attachment.on_unit_lost(lambda: None)
            await stack.enter_async_context(background(follow_commands(attachment, engine), "commands"))
        yield


async def test_a_model_sleeps_and_wakes_on_command_and_for_a_request(tmp_path: Path) -> None:
    async with served(tmp_path, make_unit(awake=AwakeLimits(max_awake=2)), SystemClock()) as unit:
        workers = [*await unit.attach_ready("a"), *await unit.attach_ready("c")]
        assert [worker.command.engine for worker in workers] == ["awake", "awake", "dropped", "dropped"]
        record = unit.unit.states.models
        async with obeying(*workers):
            await command(unit, "SleepModel", model="a")
            assert record["a"].state is ModelState.ASLEEP
            await command(unit, "SleepModel", model="a", drop_weights=True)
            engines = [unit.unit.workers[worker.worker].engine for worker in workers]
            assert engines == [EngineState.DROPPED] * 4
            router = unit.router()
            router.offer(queued(1, "c"))
            assert (await router.credit()).entry_id == 1
            assert record["c"].state is ModelState.AWAKE
            await command(unit, "WakeModel", model="a")  # it evicts b, which has no workers
            assert [record[name].state for name in "abc"] == [ModelState.AWAKE, ModelState.ASLEEP, ModelState.AWAKE]


async def test_a_request_that_is_withdrawn_while_its_model_wakes_leaves_nothing(tmp_path: Path) -> None:
    async with served(tmp_path, make_unit(awake=AwakeLimits(max_awake=2)), SystemClock()) as unit:
        workers = await unit.attach_ready("c")
        router = unit.router()
        router.offer(queued(1, "c"))
        router.send(withdraw=1)
        await router.no_credit()
        assert unit.unit.states.models["c"].state is ModelState.WAKING
        async with obeying(*workers):
            router.offer(queued(2, "c"))
            assert (await router.credit()).entry_id == 2


@pytest.mark.parametrize("other", ["SleepModel", "RemoveModel"])
async def test_the_command_to_wake_ends_when_another_one_makes_it_void(tmp_path: Path, other: str) -> None:
    async with served(tmp_path, make_unit(awake=AwakeLimits(max_awake=2)), SystemClock()) as unit:
        workers = await unit.attach_ready("c")
        waking = asyncio.create_task(command(unit, "WakeModel", model="c"))
        while unit.unit.states.models["c"].state is not ModelState.WAKING:
            await asyncio.sleep(0)
        voiding = asyncio.create_task(command(unit, other, model="c"))
        with pytest.raises(RequestAborted, match="'c' was told to sleep, or was removed, before it was awake"):
            await waking
        async with obeying(*workers):
            await voiding


async def test_a_model_that_the_unit_does_not_have_is_named(tmp_path: Path) -> None:
    async with served(tmp_path, make_unit(), SystemClock()) as unit:
        with pytest.raises(ModelNotFound, match="'x' is not on unit unit7; it has: a, b, c"):
            await command(unit, "WakeModel", model="x")


async def test_a_model_is_added_and_removed_while_the_unit_runs(tmp_path: Path) -> None:
    async with served(tmp_path, make_unit(), SystemClock()) as unit:
        router = unit.router()
        await router.no_credit()
        await command(unit, "AddModel", model="d")
        await command(unit, "AddModel", model="d")  # again, as after a restart of kvstore in between
        hello = (await router.next()).hello
        assert {one.model: one.fingerprint for one in hello.models}["d"] == "weights of d"
        await unit.attach_ready("d")
        router.offer(queued(1, "d"))
        credit = await router.credit()
        router.offer(queued(2, "d", num_tokens=8))
        await router.credit()
        removing = asyncio.create_task(command(unit, "RemoveModel", model="d"))
        router.offer(queued(3, "a"))
        await router.no_credit()
        assert not removing.done(), "its leases have not ended"
        router.send(return_credit=credit.lease)
        unit.unit.router_gone(next(iter(unit.service._routers)))
        unit.service.changed()
        await removing
        assert "d" not in unit.unit.models
        with pytest.raises(ModelNotFound):
            await command(unit, "RemoveModel", model="d")


async def test_what_depends_on_the_models_is_told_when_they_change(tmp_path: Path) -> None:
    async with served(tmp_path, make_unit(), SystemClock()) as unit:
        changes = list[list[str]]()
        unit.placed.on_changed = lambda: changes.append(sorted(unit.placed.configs))
        await command(unit, "AddModel", model="d")
        await command(unit, "RemoveModel", model="d")
        assert changes == [["d"], []]


async def test_a_model_is_removed_also_if_the_command_is_cancelled_before_its_last_lease_ends(tmp_path: Path) -> None:
    async with served(tmp_path, make_unit(), SystemClock()) as unit:
        await command(unit, "AddModel", model="d")
        await unit.attach_ready("d")
        router = unit.router()
        router.offer(queued(1, "d"))
        credit = await router.credit()
        removing = asyncio.create_task(command(unit, "RemoveModel", model="d"))
        while unit.unit.serves("d"):
            await asyncio.sleep(0)
        removing.cancel()
        await asyncio.gather(removing, return_exceptions=True)
        assert "d" in unit.placed.configs, "it has a lease"
        router.send(return_credit=credit.lease)
        unit.unit.router_gone(next(iter(unit.service._routers)))
        unit.service.changed()
        assert "d" not in unit.unit.models and "d" not in unit.placed.configs


async def test_on_a_gpu_weights_are_not_dropped_and_no_model_is_added(tmp_path: Path) -> None:
    config = UnitConfig(name="gpu0", device="cuda:0", models=(ModelConfig(name="a"),))
    async with served(tmp_path, make_unit(), SystemClock()) as unit:
        placed = PlacedModels({})
        commands = ModelService(config, unit.unit, SystemClock(), unit.service, read_model, placed)
        context = cast(Any, None)
        with pytest.raises(InvalidRequest, match="gpu0 is on a GPU, where one copy of the weights belongs to all"):
            await commands.SleepModel(kvstore_pb2.SleepModelRequest(model="a", drop_weights=True), context)
        assert unit.unit.states.admits("a")
        with pytest.raises(InvalidRequest, match="gpu0 is on a GPU, where the memory for weights is allocated when"):
            await commands.AddModel(kvstore_pb2.AddModelRequest(model="d"), context)
        await commands.SleepModel(kvstore_pb2.SleepModelRequest(model="a"), context)
        assert unit.unit.states.models["a"].state is ModelState.ASLEEP


async def test_over_a_port_models_sleep_and_wake_but_do_not_come_and_go(tmp_path: Path) -> None:
    address = f"127.0.0.1:{bindable_port('127.0.0.1:0')}"
    async with served(tmp_path, make_unit(), SystemClock(), address=address) as unit:
        for name in ("AddModel", "RemoveModel"):
            with pytest.raises(Unauthenticated, match="over the unix socket of the unit only"):
                await command(unit, name, model="a")
        await command(unit, "SleepModel", model="a")
        assert unit.unit.states.models["a"].state is ModelState.ASLEEP
