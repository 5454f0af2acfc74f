"""The units in deploy/systemd: valid for systemd, and their command lines start a mesh that serves and stops."""

import asyncio
import configparser
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from muxmesh.client import MeshClient
from muxmesh.supervisor.mesh_supervisor import free_listen_address
from tests.support.processes import ended

UNITS = Path(__file__).resolve().parents[2] / "deploy" / "systemd"
NAMES = [*sorted(path.name for path in UNITS.glob("*.service")), "muxmesh.target"]
SEPARATE = {
    "muxmesh-kvstore@.service": "u",
    "muxmesh-prefill@.service": "u:model-1.b",
    "muxmesh-decode@.service": "u:model-1.b",
    "muxmesh-router@.service": "first",
}


class Machine:
    """A root folder for the paths in the units, with the programs of this environment."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("opt/muxmesh/bin", "etc/muxmesh", "run/muxmesh", "var/cache/muxmesh", "var/lib/muxmesh"):
            (root / folder).mkdir(parents=True)
        (root / "run/muxmesh").chmod(0o700)
        for name, module in (("python", ""), ("muxmesh", "-m muxmesh")):
            script = root / "opt/muxmesh/bin" / name
            script.write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
            script.chmod(0o755)

    def here(self, text: str) -> str:
        """``text`` with the paths of the units below the root folder."""
        for path in ("/opt/muxmesh", "/etc/muxmesh", "/run/muxmesh", "/var/cache/muxmesh", "/var/lib/muxmesh"):
            text = text.replace(path, f"{self.root}{path}")
        return text

    def command(self, unit: str, instance: str = "") -> list[str]:
        """What systemd runs for a unit: its ExecStart with `%i`, `%%` and `$$` expanded."""
        (line,) = [text for text in (UNITS / unit).read_text().splitlines() if text.startswith("ExecStart=")]
        expanded = line.removeprefix("ExecStart=").replace("%i", instance).replace("%%", "%").replace("$$", "$")
        return shlex.split(self.here(expanded))

    @property
    def environment(self) -> Mapping[str, str]:
        """The environment of every service."""
        lines = (UNITS / "muxmesh-.service.d" / "sandbox.conf").read_text().splitlines()
        settings = [line.removeprefix("Environment=") for line in lines if line.startswith("Environment=")]
        return {**os.environ, **dict(one.split("=", 1) for text in settings for one in self.here(text).split())}

    @asynccontextmanager
    async def service(self, unit: str, instance: str = "") -> AsyncIterator[asyncio.subprocess.Process]:
        """Runs a unit's command from the message that it is ready to a SIGTERM, after which it has to exit with 0."""
        path = self.root / f"{unit.partition('@')[0]}.notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as manager:
            manager.bind(str(path))
            environment = {**self.environment, "NOTIFY_SOCKET": str(path)}
            started = await asyncio.create_subprocess_exec(*self.command(unit, instance), env=environment)
            async with ended(started) as process:
                async with asyncio.timeout(120):
                    while b"READY=1" not in await asyncio.get_running_loop().sock_recv(manager, 1000):
                        pass
                yield process
                process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(60):
                    assert await process.wait() == 0


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def write_mesh(machine: Machine, redis_url: str | None) -> str:
    """Writes mesh.yaml; returns the address of its public API."""
    listen = free_listen_address("127.0.0.1:0")
    redis = "" if redis_url is None else f"redis_url: {redis_url}\n"
    unit = "units:\n  - {name: u, kv_pool: 64MiB, models: [{name: model-1.b, engine: sim}]}\n"
    (machine.root / "etc/muxmesh/mesh.yaml").write_text(f"listen: {listen}\n{redis}{unit}")
    return listen


async def output_of(listen: str) -> int:
    """The number of tokens that a prompt is answered with."""
    async with MeshClient(listen) as client:
        return len((await client.generate("Hello", max_new_tokens=5)).token_ids)


@pytest.mark.mesh
async def test_the_separate_services_start_serve_and_stop_as_their_units_run_them(
    machine: Machine, redis_url: str
) -> None:
    listen = write_mesh(machine, redis_url)
    prepare = machine.command("muxmesh-prepare.service")
    await asyncio.to_thread(subprocess.run, prepare, env=machine.environment, check=True, timeout=120)
    assert (machine.root / "run/muxmesh/runtime.json").is_file()
    async with AsyncExitStack() as stack:
        for unit, name in SEPARATE.items():
            await stack.enter_async_context(machine.service(unit, name))
        assert await output_of(listen) == 5


@pytest.mark.mesh
async def test_the_service_of_a_whole_mesh_starts_serves_and_stops_as_its_unit_runs_it(machine: Machine) -> None:
    listen = write_mesh(machine, None)
    async with machine.service("muxmesh.service"):
        assert await output_of(listen) == 5


@pytest.mark.parametrize("name", NAMES)
def test_systemd_finds_nothing_wrong_in_a_unit(name: str, machine: Machine) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    folder = machine.root / "units"
    shutil.copytree(UNITS, folder)
    shutil.copytree(folder / "muxmesh-.service.d", folder / "muxmesh.service.d")
    for path in folder.glob("*.service"):
        path.write_text(machine.here(path.read_text()))
    run = subprocess.run(
        [program, "verify", "--man=no", str(folder / name)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("name", NAMES)
def test_a_unit_is_enabled_by_the_target_of_its_kind(name: str) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(UNITS / name)
    is_part = name.startswith("muxmesh-")
    assert unit["Install"]["WantedBy"] == ("muxmesh.target" if is_part else "multi-user.target")
    assert unit["Unit"].get("PartOf") == ("muxmesh.target" if is_part else None)
