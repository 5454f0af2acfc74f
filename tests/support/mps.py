"""An MPS daemon of the fake control program, and clients of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from muxmesh.config.runtime import MeshRuntime, MpsDaemons
from muxmesh.config.schema import MeshConfig
from muxmesh.cuda.mps import CONTROL_PROGRAM, LOG_DIRECTORY, MpsControl

FAKE_FOLDER = Path(__file__).parent / "fake_mps"
"""To be put first in PATH."""
FAKE_PROGRAM = FAKE_FOLDER / CONTROL_PROGRAM
RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "mps_answers.json").read_text())
"""Answers of the real control program."""

CLIENT = """
import os, signal, socket
connection = socket.socket(socket.AF_UNIX)
connection.connect(os.environ["CUDA_MPS_PIPE_DIRECTORY"] + "/control")
connection.sendall(b"client %d\\n" % os.getpid())
print(connection.recv(100).decode().strip() or "refused", flush=True)
while line := connection.recv(100):
    print(line.decode().strip(), flush=True)
signal.pause()
"""
"""Connects as a client of the fake driver does, and prints what the daemon sends. Outlives the daemon."""


class FakeDaemon:
    """A daemon of the fake control program in the foreground."""

    def __init__(self, process: subprocess.Popen[bytes], control: MpsControl) -> None:
        self.process = process
        self.control = control
        self.pipe_dir = control.pipe_dir

    def fail(self, how: str) -> None:
        """Lets the daemon fail in a way that its head lists."""
        (self.pipe_dir / f"fake.{how}").touch()

    def recover(self, how: str) -> None:
        (self.pipe_dir / f"fake.{how}").unlink()

    @property
    def log(self) -> list[str]:
        """What the daemon has done: `control_program.Daemon`."""
        return (Path(self.control.environment[LOG_DIRECTORY]) / "control.log").read_text().splitlines()

    def client(self) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        """See `client_of`."""
        return client_of(self.control)


@contextlib.contextmanager
def client_of(control: MpsControl) -> Iterator[subprocess.Popen[bytes]]:
    """A client that is connected, until the block ends."""
    environment = {**os.environ, **control.environment}
    with subprocess.Popen((sys.executable, "-c", CLIENT), env=environment, stdout=subprocess.PIPE) as process:
        try:
            assert next_line(process) == "connected"
            yield process
        finally:
            process.kill()


def next_line(process: subprocess.Popen[bytes]) -> str:
    """The next line that a process prints."""
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def mps_runtime(folder: Path, units: Sequence[Mapping[str, Any]], uuids: Mapping[str, str]) -> MeshRuntime:
    """The runtime of a mesh in ``folder``, with the fake control program. ``uuids``: of the GPUs, by unit name.

    Has no Redis and no prepared models.
    """
    return MeshRuntime(
        config=MeshConfig.model_validate({"units": units}),
        run_dir=folder,
        cache_dir=folder,
        redis_url="unix:///x",
        prepared={},
        device_uuids=dict(uuids),
        mps=MpsDaemons(program=FAKE_PROGRAM, log_dir=folder / "logs"),
    )


def fake_daemon(folder: Path, answer_within_s: float = 5.0) -> contextlib.AbstractContextManager[FakeDaemon]:
    """See `daemon_of`. Its directories are in ``folder``."""
    return daemon_of(MpsControl(FAKE_PROGRAM, folder / "pipe", folder / "log", answer_within_s))


@contextlib.contextmanager
def daemon_of(control: MpsControl) -> Iterator[FakeDaemon]:
    """Creates the directories of ``control``, and runs a daemon in them until the block ends."""
    for directory in control.environment.values():
        Path(directory).mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **control.environment}
    with subprocess.Popen((FAKE_PROGRAM, "-f"), env=environment, stdout=subprocess.PIPE) as process:
        try:
            assert next_line(process) == "listening"
            yield FakeDaemon(process, control)
        finally:
            for how in ("silent", "nonsense", "deaf_to_quit"):
                (control.pipe_dir / f"fake.{how}").unlink(missing_ok=True)
            subprocess.run(FAKE_PROGRAM, env=environment, input=b"quit\n", check=False, capture_output=True)
            process.kill()
