"""One compose project on a test engine, used as by a user: `docker compose` in compose/, clients outside containers.

Knows compose and containers, not what is tested.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muxmesh.clock import SystemClock
from tests.compose.docker_engine import DockerEngine
from tests.compose.stream_client import Stream

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "compose"
_LONGEST_WAIT_S = 150


@dataclass(frozen=True, slots=True)
class Result:
    """Exit code of a command, and what it printed on both streams."""

    code: int
    output: str


class Stack:
    """A project of its own. ``values`` take the place of lines in .env; ``files`` of compose.yaml alone."""

    def __init__(
        self, engine: DockerEngine, name: str, values: Mapping[str, str], files: tuple[str, ...] = ("compose.yaml",)
    ) -> None:
        self.engine = engine
        self.name = name
        self.files = files
        self.values = {"HEALTH_INTERVAL": "1s", "START_PERIOD": "20s", **values}

    @property
    def address(self) -> str:
        """Of the router, in the network where ports are published."""
        return f"127.0.0.1:{self.values['PORT']}"

    def compose(self, *arguments: str) -> Result:
        """Runs `docker compose ARGUMENTS`."""
        files = [word for file in self.files for word in ("--file", file)]
        return _run(
            ["docker", "compose", "--progress", "plain", *files, "--project-name", self.name, *arguments],
            COMPOSE,
            {**self.engine.environment, **self.values},
        )

    def up(self, *arguments: str) -> float:
        """`docker compose ARGUMENTS up -d --wait`; returns the seconds that it took. Fails with the logs."""
        clock = SystemClock()
        started_at_s = clock.monotonic_s()
        result = self.compose(*arguments, "up", "-d", "--wait")
        assert result.code == 0, f"{result.output}\n{self.logs()}"
        return clock.monotonic_s() - started_at_s

    def logs(self, service: str = "") -> str:
        """The logs of a service, or of all."""
        return self.compose("logs", "--no-color", *([service] if service else [])).output

    def container(self, service: str) -> str:
        """The name of the service's container."""
        return f"{self.name}-{service}-1"

    def inspect(self, service: str) -> Any:
        """What `docker inspect` knows of the service's container."""
        return json.loads(self.engine.docker("inspect", self.container(service)))[0]

    def serves(self, service: str) -> bool:
        """Whether the container runs and its health check, if it has one, passes."""
        state = self.inspect(service)["State"]
        return bool(state["Running"]) and state.get("Health", {}).get("Status", "healthy") == "healthy"

    def kill(self, service: str) -> float:
        """Kills the first process of a service; returns the seconds until the engine has another one that serves."""
        clock = SystemClock()
        pid = self.inspect(service)["State"]["Pid"]
        killed_at_s = clock.monotonic_s()
        self.engine.kill(self.container(service), signal.SIGKILL)
        self.until(lambda: self.inspect(service)["State"]["Pid"] not in (0, pid), f"a new {service}")
        self.until(lambda: self.serves(service), f"the new {service} serves")
        return clock.monotonic_s() - killed_at_s

    def until_all_serve(self, services: tuple[str, ...]) -> None:
        """Returns when all of them serve."""
        self.until(lambda: all(map(self.serves, services)), f"{', '.join(services)} serve")

    def until(self, what: Callable[[], bool], name: str) -> None:
        """Returns when ``what()`` is true. Fails, with the logs, if that takes far longer than anything here does."""
        clock = SystemClock()
        end_s = clock.monotonic_s() + _LONGEST_WAIT_S
        while not what():
            assert clock.monotonic_s() < end_s, f"waited {_LONGEST_WAIT_S} s until: {name}\n{self.logs()}"
            time.sleep(0.2)

    def outside(self, *command: str) -> Result:
        """Runs a program of this machine beside the containers, where it reaches published ports."""
        return _run(self.engine.command_inside(*command), ROOT, {"PYTHONPATH": str(ROOT)})

    def muxmesh(self, *arguments: str, address: str | None = None) -> Result:
        """Runs the command line tool of this checkout against the published port."""
        return self.outside(sys.executable, "-m", "muxmesh", *arguments, "--address", address or self.address)

    def status(self) -> Any:
        """The status of the mesh, as `muxmesh status --json` prints it."""
        result = self.muxmesh("status", "--json")
        assert result.code == 0, result.output
        return json.loads(result.output)

    @contextmanager
    def streams(self, model: str, num_streams: int, num_tokens: int) -> Iterator[list[Stream]]:
        """Greedy streams of a client outside, all running when the block begins. The list is filled when it ends."""
        command = [sys.executable, "-m", "tests.compose.stream_client", self.address, model]
        found: list[Stream] = []
        with subprocess.Popen(
            self.engine.command_inside(*command, str(num_streams), str(num_tokens)),
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        ) as client:
            try:
                assert client.stdout is not None
                assert client.stdout.readline() == "running\n"
                yield found
                output, _ = client.communicate(timeout=_LONGEST_WAIT_S)
                found += [Stream(**one) for one in json.loads(output)]
            finally:
                client.kill()

    def left(self) -> list[str]:
        """Ids of containers, volumes and networks of the project."""
        of_project = ("--filter", f"label=com.docker.compose.project={self.name}", "--quiet")
        commands = (("ps", "--all"), ("volume", "ls"), ("network", "ls"))
        return [line for command in commands for line in self.engine.docker(*command, *of_project).split()]

    def down(self) -> None:
        """`docker compose down -v`, of all profiles, and of services that other files added."""
        result = self.compose("--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "5")
        assert result.code == 0, result.output


@contextmanager
def running_stack(stack: Stack) -> Iterator[Stack]:
    """The stack until the end of the block, and nothing of it afterwards."""
    try:
        yield stack
    finally:
        stack.down()


def _run(command: list[str], folder: Path, environment: Mapping[str, str]) -> Result:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_LONGEST_WAIT_S,
        check=False,
    )
    return Result(done.returncode, done.stdout)
