"""A mesh without a supervisor: its services are started one by one, and started again whenever they exit."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from muxmesh.background_task import end
from muxmesh.config.runtime import MeshRuntime, ProcessKey
from muxmesh.types import Role

_RESTART_AFTER_S = 0.1


async def output_of(*command: str, code: int = 0) -> str:
    """Runs a command that ends; returns what it prints, and checks its exit code."""
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    async with asyncio.timeout(60):
        printed, _ = await process.communicate()
    assert process.returncode == code, printed.decode()
    return printed.decode()


class RestartedService:
    """One service. What starts it knows only its command and its exit, as a service manager does."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = tuple(command)
        self.exit_codes: list[int] = []
        self.lines: list[str] = []
        self.process: asyncio.subprocess.Process | None = None
        self._is_wanted = True
        self._restarting = asyncio.create_task(self._run())

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        """As `kill -9` does."""
        os.kill(self.pid, signal.SIGKILL)

    async def stop(self) -> int:
        """Ends the service in order, for good. Returns its exit code."""
        self._is_wanted = False
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        async with asyncio.timeout(20):
            await self._restarting
        return self.exit_codes[-1]

    async def end(self) -> None:
        """Kills the service, whatever state it is in."""
        self._is_wanted = False
        await end(self._restarting)
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def until_line(self, text: str) -> str:
        """Waits for a line of the output that contains ``text``."""
        async with asyncio.timeout(30):
            while not (found := [line for line in self.lines if text in line]):
                await asyncio.sleep(0.02)
        return found[0]

    async def _run(self) -> None:
        while self._is_wanted:
            self.process = await asyncio.create_subprocess_exec(
                *self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            assert self.process.stdout is not None
            async for line in self.process.stdout:
                self.lines.append(line.decode().rstrip())
            self.exit_codes.append(await self.process.wait())
            if self._is_wanted:
                await asyncio.sleep(_RESTART_AFTER_S)


class StandaloneMesh:
    """The services of one runtime file, by name. Nothing is started by itself."""

    def __init__(self, runtime_file: Path) -> None:
        self.runtime_file = runtime_file
        self.runtime = MeshRuntime.read(runtime_file)
        self.services: dict[str, RestartedService] = {}

    def command(self, key: ProcessKey, *more: str) -> tuple[str, ...]:
        """What an operator types to start a service."""
        module = f"{key.role.value}_svc" if isinstance(key.role, Role) else key.role
        named = [text for name in ("unit", "model") if (value := getattr(key, name)) for text in (f"--{name}", value)]
        return (sys.executable, "-m", module, "--runtime", str(self.runtime_file), *named, *more)

    def start(self, key: ProcessKey, *more: str, name: str = "") -> RestartedService:
        name = name or self.runtime.display_name(key)
        service = self.services[name] = RestartedService(self.command(key, *more))
        return service

    async def until_healthy(self, *names: str) -> None:
        """Waits until `muxmesh health` says so of each process."""
        for name in names:
            async with asyncio.timeout(60):
                while not await self._is_healthy(name):
                    pass

    async def _is_healthy(self, name: str) -> bool:
        command = (sys.executable, "-m", "muxmesh", "health", "--runtime", str(self.runtime_file), name)
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return await process.wait() == 0


@contextlib.asynccontextmanager
async def standalone_mesh(runtime_file: Path) -> AsyncIterator[StandaloneMesh]:
    """The mesh of a runtime file. Its services are killed at the end; their last lines are printed after a failure."""
    mesh = StandaloneMesh(runtime_file)
    try:
        yield mesh
    except BaseException:
        for name, service in mesh.services.items():
            print(f"{name}: exit codes {service.exit_codes}", *service.lines[-15:], sep="\n  ")
        raise
    finally:
        for service in mesh.services.values():
            await service.end()
