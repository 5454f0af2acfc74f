"""An MPS daemon for a benchmark or a check, asked through the product's own control of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu.peer import Peer
from muxmesh.cuda.mps import SHARE, MpsControl, find_control_program
from muxmesh.errors import Unavailable
from muxmesh.supervisor.mps_checks import mps_answers


def control_program() -> Path:
    """The control program of this machine. Raises Unavailable if it has none."""
    program = find_control_program()
    if program is None:
        raise Unavailable("this machine has no MPS control program")
    return program


@contextlib.asynccontextmanager
async def mps_daemon(*arguments: str) -> AsyncIterator[MpsControl]:
    """A daemon with directories of its own, in the foreground, until the block ends. Raises Unavailable without one."""
    program = control_program()
    with TemporaryDirectory(prefix="mps-") as folder:
        control = MpsControl(program, Path(folder) / "p", Path(folder) / "l")
        for directory in control.environment.values():
            Path(directory).mkdir()
        with subprocess.Popen((program, "-f", *arguments), env={**os.environ, **control.environment}) as process:
            try:
                await _until_it_answers(control, process)
                yield control
            finally:
                with contextlib.suppress(Unavailable):
                    await control.quit()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                for log in Path(folder).glob("l/*"):
                    print(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}")


async def _until_it_answers(control: MpsControl, process: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        if process.poll() is not None:
            raise Unavailable(f"the MPS daemon exited with {process.returncode}")
        if await mps_answers(control):
            return
        await asyncio.sleep(0.05)
    raise Unavailable("the MPS daemon does not answer")


def mps_client(control: MpsControl, share: int, operations: str = "torch") -> Peer:
    """A peer that is a client of the daemon with ``share`` percent of the SMs."""
    return Peer(operations, {**control.environment, SHARE: str(share)})
