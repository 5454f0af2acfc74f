"""Questions to an MPS daemon through its control program, and the answers as values.

With MPS (Multi-Process Service) several processes compute on one GPU at the same time, each on at most a share of its
multiprocessors. A daemon listens in a pipe directory; it starts a server when the first client connects, and the
control program passes it commands. A client that finds no daemon runs without a limit and without an error.

Knows the words of the control program, as recorded on a card (``tests/support/mps_answers.json``). Starts no daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from muxmesh.errors import Unavailable
from muxmesh.quoting import quoted

CONTROL_PROGRAM = "nvidia-cuda-mps-control"
CONTROL_FOLDERS = (
    "/usr/local/nvidia/bin", "/usr/bin", "/usr/local/cuda/bin", "/usr/lib/nvidia", "/usr/lib/nvidia/current",
)  # fmt: skip
"""Where drivers install the control program, for a PATH without these folders."""
ANSWER_WITHIN_S = 5.0
"""Time limit of a question. A daemon on a card answered within 0.01 s."""
PIPE_DIRECTORY = "CUDA_MPS_PIPE_DIRECTORY"
LOG_DIRECTORY = "CUDA_MPS_LOG_DIRECTORY"
SHARE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
"""A client's limit in percent of the SMs. In a daemon's environment it limits all clients."""


class ServerStatus(Enum):
    """State of an MPS server. One in FAULT accepts no client until all clients that it had have exited."""

    INITIALIZING = "INITIALIZING"
    ACTIVE = "ACTIVE"
    FAULT = "FAULT"


@dataclass(frozen=True, slots=True)
class MpsServer:
    """A server of the daemon, and the pids of its clients in the daemon's pid namespace."""

    pid: int
    status: ServerStatus
    clients: frozenset[int]


def find_control_program() -> Path | None:
    """The control program on PATH or in `CONTROL_FOLDERS`; None if this machine has none."""
    found = shutil.which(CONTROL_PROGRAM) or shutil.which(CONTROL_PROGRAM, path=os.pathsep.join(CONTROL_FOLDERS))
    return None if found is None else Path(found)


class MpsControl:
    """Asks the daemon that listens in one pipe directory. Each question is a process of its own."""

    def __init__(self, program: Path, pipe_dir: Path, log_dir: Path, answer_within_s: float = ANSWER_WITHIN_S) -> None:
        self.program = program
        self._answer_within_s = answer_within_s
        self.pipe_dir = pipe_dir
        self.environment: Mapping[str, str] = {PIPE_DIRECTORY: str(pipe_dir), LOG_DIRECTORY: str(log_dir)}
        """Variables by which the daemon and its clients find the two directories."""

    async def server_pids(self) -> tuple[int, ...]:
        """Servers that the daemon has started; none before the first client. Raises Unavailable, see `ask`."""
        return parse_pids(await self.ask("get_server_list"))

    async def servers(self) -> tuple[MpsServer, ...]:
        """The servers with their states and clients. Raises Unavailable, see `ask`."""
        found = [await self._server(pid) for pid in await self.server_pids()]
        return tuple(server for server in found if server is not None)

    async def terminate_client(self, server: int, client: int) -> bool:
        """Ends all work of a client on the device; its process lives on. False if the server has no such client.

        Other clients of the server go on, whereas a signal to a client with work in flight faults all of them. The
        client stays in the list until its process has exited. Raises Unavailable, see `ask`.
        """
        return parse_code(await self.ask(f"terminate_client {server} {client}")) == 0

    async def quit(self) -> None:
        """Asks the daemon to stop its servers and to exit. Raises Unavailable, see `ask`."""
        await self.ask("quit")

    async def ask(self, *commands: str) -> str:
        """The daemon's answers to ``commands``, one after another.

        Raises Unavailable if no daemon listens, it does not answer in time, or the program cannot be started.
        """
        try:
            with _pipe_with("".join(f"{one}\n" for one in commands).encode()) as stdin:
                process = await asyncio.create_subprocess_exec(
                    self.program,
                    env={**os.environ, **self.environment},
                    stdin=stdin,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE,
                )
        except OSError as error:
            raise Unavailable(f"{self.program} cannot be started: {error.strerror or error}") from error
        try:
            async with asyncio.timeout(self._answer_within_s):
                answer, problem = await process.communicate()
        except TimeoutError:
            raise Unavailable(
                f"the MPS daemon in {self.pipe_dir} did not answer {commands[0]!r} in {self._answer_within_s:g} s"
            ) from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode:
            said = (problem or answer).decode(errors="replace").strip()
            raise Unavailable(f"no MPS daemon answers in {self.pipe_dir}: {quoted(said)}")
        return answer.decode(errors="replace")

    async def _server(self, pid: int) -> MpsServer | None:
        """One server; None if it has ended since it was listed."""
        return parse_server(pid, await self.ask(f"get_server_status {pid}", f"get_client_list {pid}"))


@contextlib.contextmanager
def _pipe_with(content: bytes) -> Iterator[int]:
    """The read end of a pipe that holds ``content``, at most 64 KiB.

    The program may exit before it has read its commands, since it finds no daemon: nothing is written to it by then.
    """
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, content)
        os.close(write_end)
        yield read_end
    finally:
        os.close(read_end)


def parse_pids(answer: str) -> tuple[int, ...]:
    """The pids of a list, one in a line. Raises Unavailable for anything else."""
    try:
        return tuple(int(line) for line in answer.split())
    except ValueError:
        raise Unavailable(f"the MPS daemon answered {quoted(answer)} where pids are expected, one in a line") from None


def parse_code(answer: str) -> int:
    """The code in the last line of an answer, 0 for success. Raises Unavailable if there is none."""
    *_, last = ["", *answer.split()]
    if not last.isdecimal():
        raise Unavailable(f"the MPS daemon answered {quoted(answer)} where a code is expected in the last line")
    return int(last)


def parse_server(pid: int, answer: str) -> MpsServer | None:
    """A server from the answers to get_server_status and get_client_list; None if the daemon knows no such server.

    Raises Unavailable for any other answer.
    """
    status, _, clients = answer.partition("\n")
    if status == f"Server {pid} not found":
        return None
    try:
        return MpsServer(pid, ServerStatus(status), frozenset(parse_pids(clients)))
    except ValueError:
        expected = ", ".join(one.value for one in ServerStatus)
        raise Unavailable(f"the MPS daemon answered {quoted(status)} where one of {expected} is expected") from None
