"""Timers as processes: of the sim engine, and one of a tiny real model."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from muxmesh.cli.common import cache_dir
from muxmesh.config.runtime import PreparedModel
from muxmesh.config.schema import MeshConfig
from muxmesh.cuda.device_list import DeviceList
from muxmesh.errors import EngineFailed
from muxmesh.models.prepared_model import prepare_model
from muxmesh.placement.measured_cells import Cell
from muxmesh.profiler.profiled_models import ProfiledModel, profiled_models
from muxmesh.profiler.timer_mesh import TimerMesh
from muxmesh.types import Role
from tests.support.gpu_machine import gpu_machine
from tests.support.mps import FAKE_PROGRAM
from tests.support.profiles import sim_model
from tests.support.tiny import TinyShape, write_tiny_model

STEP_S = 0.002


def cells(share: int) -> list[Cell]:
    """What timers of the model `m` are opened for."""
    return [Cell("m", Role.DECODE, share, 2, 64)]


def timer_mesh(model: ProfiledModel) -> TimerMesh:
    return TimerMesh([model], cache_dir(), {}, None)


async def test_timers_run_side_by_side_and_end_with_their_contexts() -> None:
    model = sim_model(sim={"base_s": STEP_S})
    async with (
        timer_mesh(model) as mesh,
        mesh.open(cells(50)) as one,
        mesh.open(cells(100)) as other,
    ):
        assert one.pid != other.pid
        samples = await one.times(Role.DECODE, 2, 64, repeats=3, longest_s=0.1)
        assert len(samples) >= 3 and min(samples) >= STEP_S
        from_s = asyncio.get_running_loop().time() + 0.05
        found = await asyncio.gather(
            *(timer.intervals(Role.PREFILL, 1, 64, from_s, from_s + 0.1) for timer in (one, other))
        )
        assert all(intervals and intervals[0][0] >= from_s for intervals in found)
        pids = one.pid, other.pid
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


async def test_a_real_model_is_timed_in_memory_of_its_own(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny", TinyShape())
    config = MeshConfig.model_validate({"units": [{"models": [{"name": "tiny", "source": str(tmp_path / "tiny")}]}]})
    unit = config.units[0]
    files = prepare_model(unit.models[0], "panels", tmp_path, cache_dir(), lambda phase, done, total: None)
    (model,) = profiled_models(config, {unit.name: {"tiny": files}})
    async with timer_mesh(model) as mesh, mesh.open([Cell(model.source, Role.DECODE, 100, 3, 40)]) as timer:
        for role in Role:
            assert all(0 < seconds < 10 for seconds in await timer.times(role, 3, 40, repeats=2, longest_s=0.05))


async def test_a_model_that_cannot_be_loaded_is_an_error_with_its_reason(tmp_path: Path) -> None:
    model = sim_model()
    broken = ProfiledModel(
        model.unit,
        model.config,
        PreparedModel(folder=tmp_path / "gone", image=None, weights_fingerprint="w"),
        model.spec,
    )
    async with timer_mesh(broken) as mesh:
        with pytest.raises(EngineFailed, match=r"m on a share of 100: .*gone"):
            async with mesh.open(cells(100)):
                pass


async def test_a_process_that_is_killed_is_an_error() -> None:
    async with (
        timer_mesh(sim_model(sim={"base_s": 60.0})) as mesh,
        mesh.open(cells(100)) as timer,
    ):
        question = asyncio.create_task(timer.times(Role.DECODE, 1, 64, 1, 1.0))
        await asyncio.sleep(0)
        timer.kill()
        with pytest.raises(EngineFailed, match="its process ended with code -9"):
            await question


async def test_on_a_gpu_a_timer_is_a_client_of_a_daemon_of_its_own_and_limited_to_its_share() -> None:
    with gpu_machine():
        (device,) = DeviceList().devices
        model = sim_model(device="cuda:0", sim={"base_s": STEP_S})
        uuids = {model.unit.name: device.uuid}
        timers = TimerMesh([model], cache_dir(), uuids, FAKE_PROGRAM, device.num_sms)
        async with timers as mesh, mesh.open(cells(50)) as timer:
            assert timer.facts["mps"] is True
            assert timer.facts["num_sms"] == device.num_sms // 2
            assert min(await timer.times(Role.DECODE, 2, 64, repeats=2, longest_s=0.05)) >= STEP_S


async def test_a_timer_that_a_green_context_limits_is_a_client_with_all_sms() -> None:
    with gpu_machine():
        (device,) = DeviceList().devices
        model = sim_model(device="cuda:0", sim={"base_s": STEP_S})
        model = replace(model, unit=model.unit.model_copy(update={"green_contexts": True}))
        uuids = {model.unit.name: device.uuid}
        timers = TimerMesh([model], cache_dir(), uuids, FAKE_PROGRAM, device.num_sms)
        async with timers as mesh, mesh.open(cells(50)) as one, mesh.open(cells(50), beside=[50]) as other:
            for timer in (one, other):
                assert (timer.facts["num_sms"], timer.facts["mps"]) == (device.num_sms, True)


def num_daemons() -> int:
    """Processes of this one that keep an MPS daemon."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return sum("mps_daemon" in Path(f"/proc/{pid}/cmdline").read_text() for pid in children)


async def test_units_on_one_gpu_have_one_daemon() -> None:
    with gpu_machine():
        (device,) = DeviceList().devices
        one, other = (sim_model(name, device="cuda:0", sim={"base_s": STEP_S}) for name in ("m", "n"))
        second = replace(other, unit=other.unit.model_copy(update={"name": "second"}))
        uuids = {one.unit.name: device.uuid, "second": device.uuid}
        async with TimerMesh([one, second], cache_dir(), uuids, FAKE_PROGRAM, device.num_sms) as mesh:
            assert num_daemons() == 1
            async with mesh.open(cells(50)) as timer, mesh.open([Cell("n", Role.DECODE, 50, 2, 64)]) as beside:
                assert timer.facts["mps"] is True
                assert beside.facts["mps"] is True
