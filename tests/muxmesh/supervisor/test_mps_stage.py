"""MPS daemons as a stage of the supervisor: daemons of the fake control program, and small programs as services."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from muxmesh.config.schema import MeshConfig
from muxmesh.errors import Unavailable
from muxmesh.process_state import has_ended
from muxmesh.supervisor.mesh_supervisor import make_runtime
from muxmesh.supervisor.mps_checks import mps_answers
from tests.muxmesh.supervisor.test_mesh_supervisor import PREPARED, Mesh, started
from tests.support.mps import FAKE_PROGRAM, client_of

UUIDS = ("GPU-5f4df884-095b-d388-4934-d4853eca3833", "GPU-01234567-095b-d388-4934-d4853eca3833")
MODELS = [{"name": "m"}]
TWO_UNITS_ON_ONE_GPU = [
    {"name": "u", "device": "cuda:0", "models": MODELS},
    {"name": "v", "device": "cuda:0", "models": MODELS},
]
ONE_UNIT = [{"name": "u", "device": "cuda:0", "models": [{"name": "m", "compute_share": {"prefill": 60}}]}]


@pytest.fixture
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path that is short enough for sockets."""
    return tmp_path_factory.mktemp("s")


def gpu_mesh(state_dir: Path, units: list[dict[str, Any]], program: Path | None = FAKE_PROGRAM) -> Mesh:
    config = MeshConfig.model_validate({"units": units})
    prepared = {unit.name: {model.name: PREPARED for model in unit.models} for unit in config.units}
    uuids = {unit.name: UUIDS[unit.device_index] for unit in config.units if unit.is_cuda}
    return Mesh(state_dir, make_runtime(config, prepared, state_dir, state_dir / "cache", uuids, program))


def names(mesh: Mesh) -> list[str]:
    return [process.spec.name for process in mesh.supervisor.processes]


@pytest.mark.parametrize(
    ("units", "program", "daemons"),
    [
        (ONE_UNIT, FAKE_PROGRAM, ["mps-5f4df884"]),
        (TWO_UNITS_ON_ONE_GPU, FAKE_PROGRAM, ["mps-5f4df884"]),
        (
            [TWO_UNITS_ON_ONE_GPU[0], {"name": "v", "device": "cuda:1", "models": MODELS}],
            FAKE_PROGRAM,
            ["mps-5f4df884", "mps-01234567"],
        ),
        ([{"name": "u", "device": "cuda:0", "mps": "off", "models": MODELS}], FAKE_PROGRAM, []),
        (ONE_UNIT, None, []),
        ([{"name": "u", "models": MODELS}], FAKE_PROGRAM, []),
    ],
)
async def test_each_gpu_with_a_unit_that_uses_mps_has_a_daemon_before_the_kvstores(
    state_dir: Path, units: list[dict[str, Any]], program: Path | None, daemons: list[str]
) -> None:
    mesh = gpu_mesh(state_dir, units, program)
    listed = names(mesh)
    assert listed[: len(daemons) + 1] == ["redis", *daemons]
    assert listed[len(daemons) + 1].startswith("kvstore/")
    assert [name for name in listed if name.startswith("mps-")] == daemons
    await mesh.supervisor.stop()


async def test_each_process_gets_the_environment_of_its_part(state_dir: Path) -> None:
    mesh = gpu_mesh(state_dir, ONE_UNIT)
    run_dir, logs = mesh.supervisor.runtime.run_dir, state_dir / "logs"
    shared = {
        "CUDA_VISIBLE_DEVICES": UUIDS[0],
        "CUDA_MPS_PIPE_DIRECTORY": f"{run_dir}/mps-5f4df884",
        "CUDA_MPS_LOG_DIRECTORY": f"{logs}/mps-5f4df884",
    }
    found = {
        process.spec.name: {k: v for k, v in process.spec.environment.items() if k != "MUXMESH_METRICS"}
        for process in mesh.supervisor.processes
    }
    assert found == {
        "redis": {},
        "mps-5f4df884": {},
        "kvstore/u": {"CUDA_VISIBLE_DEVICES": UUIDS[0], "CUDA_MPS_PIPE_DIRECTORY": f"{run_dir}/outside-mps"},
        "prefill/m": {**shared, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "60"},
        "decode/m": {**shared, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "100"},
        "router": {},
    }
    patient = {process.spec.name for process in mesh.supervisor.processes if process.spec.extra_checks}
    assert patient == {"prefill/m", "decode/m"}, "kvstore ends a client of MPS first"
    assert not (run_dir / "outside-mps").exists()
    await mesh.supervisor.stop()


async def test_the_daemon_answers_before_a_kvstore_starts_and_is_asked_to_quit_after_the_last_one(
    state_dir: Path,
) -> None:
    mesh = gpu_mesh(state_dir, ONE_UNIT)
    async with started(mesh):
        control = mesh.supervisor.runtime.mps_control("u")
        assert await mps_answers(control)
        started_in_order = [name for name, line in mesh.lines if line in {"up", "listening"}]
        assert started_in_order[:3] == ["redis", "mps-5f4df884", "kvstore/u"]
        pid = mesh.process("mps-5f4df884").pid
        assert pid is not None
    assert has_ended(pid)
    assert mesh.names("down")[-2:] == ["kvstore/u", "redis"]
    commands = (state_dir / "logs/mps-5f4df884/control.log").read_text().splitlines()
    assert commands[-1] == "Cmd:quit"


async def test_a_daemon_that_does_not_quit_is_killed_and_its_server_too(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muxmesh.supervisor.mesh_supervisor._STOP_GRACE_S", 0.2)
    mesh = gpu_mesh(state_dir, ONE_UNIT)
    async with started(mesh) as supervisor:
        control = supervisor.runtime.mps_control("u")
        with client_of(control):
            (server,) = await control.server_pids()
        (control.pipe_dir / "fake.deaf_to_quit").touch()
        pid = mesh.process("mps-5f4df884").pid
        assert pid is not None
    assert has_ended(pid) and has_ended(server)


async def test_a_daemon_that_cannot_start_names_its_logs_and_how_to_do_without_it(state_dir: Path) -> None:
    mesh = gpu_mesh(state_dir, ONE_UNIT, Path("/nonexistent/control"))
    with pytest.raises(Unavailable) as caught:
        async with started(mesh):
            pass
    problem, *output = str(caught.value).splitlines()
    assert problem == (
        "mps-5f4df884 exited 3 times before it was ready, last: exit code 1; "
        f"see {state_dir}/logs/mps-5f4df884, or set mps: off; its last output:"
    )
    line = "ERROR mps: the MPS daemon of unit u cannot run: [Errno 2] No such file or directory: '/nonexistent/control'"
    assert output[-1].strip() == line


async def test_a_daemon_that_is_killed_is_started_again(state_dir: Path) -> None:
    mesh = gpu_mesh(state_dir, ONE_UNIT)
    async with started(mesh) as supervisor:
        control = supervisor.runtime.mps_control("u")
        mesh.process("mps-5f4df884").signal(signal.SIGKILL)
        await mesh.until("mps-5f4df884", "listening", count=2)
        async with asyncio.timeout(20):
            while not await mps_answers(control):
                pass
