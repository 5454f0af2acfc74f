"""A control program of MPS for tests: the words of the real one, from its recorded answers, and no limits.

    -d, -f      the daemon, in the background or the foreground
    (none)      sends the commands on stdin to the daemon: `question`

The daemon listens on ``$CUDA_MPS_PIPE_DIRECTORY/control`` and starts a server, a process that only sleeps, for its
first client. Protocol of the socket, in lines:

    client PID      a process of the fake driver, at its cuInit; it gets ``connected`` and keeps the connection, whose
                    end is the end of the client. It gets ``terminated`` after terminate_client. In FAULT the daemon
                    closes the connection instead.
    ui              commands up to the end of the stream; the answer follows

It fails as long as one of these files is in the pipe directory:

    fake.silent         commands are not answered
    fake.nonsense       commands are answered with something unknown
    fake.keeps_clients  clients that are gone stay in the list
    fake.other_pids     clients are listed under other pids, as from another pid namespace
    fake.fault          the server is in FAULT; the file is deleted when the last client is gone
    fake.deaf_to_quit   quit has no effect

Imports the standard library only: it runs as a program on PATH.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

RECORDED: dict[str, Any] = json.loads((Path(__file__).resolve().parent.parent / "mps_answers.json").read_text())
SERVER, UNKNOWN_SERVER, CLIENT, UNKNOWN_CLIENT = "489", "1", "570", "999999"
"""Pids in the recorded answers."""
LONGEST_LIFE_S = "300"
"""Of a server whose daemon was killed."""


def recorded(part: str, command: str) -> str:
    return str(RECORDED[part][command]["out"])


def exit_with(answer: dict[str, Any]) -> NoReturn:
    sys.stdout.write(answer["out"])
    sys.stderr.write(answer["err"])
    sys.exit(answer["rc"])


class Daemon:
    """Owns the socket, the server process and the connections. A client whose connection is closed is gone."""

    def __init__(self, pipe_dir: Path, log_dir: Path) -> None:
        self.pipe_dir = pipe_dir
        self.log = (log_dir / "control.log").open("a", buffering=1)
        self.server: subprocess.Popen[bytes] | None = None
        self.received: dict[socket.socket, bytes] = {}
        self.clients: dict[socket.socket, int] = {}
        self.selector = selectors.DefaultSelector()
        path = pipe_dir / "control"
        path.unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(64)
        self.selector.register(self.listener, selectors.EVENT_READ)
        for name in set(RECORDED["pipe_directory"]) - {"control"}:
            (pipe_dir / name).touch()

    def run(self) -> NoReturn:
        (self.pipe_dir / "nvidia-cuda-mps-control.pid").write_text(str(os.getpid()))
        print("listening", flush=True)
        while True:
            for key, _ in self.selector.select():
                assert isinstance(key.fileobj, socket.socket)
                if key.fileobj is self.listener:
                    connection, _ = self.listener.accept()
                    self.received[connection] = b""
                    self.selector.register(connection, selectors.EVENT_READ)
                else:
                    self.read(key.fileobj)

    def fails(self, how: str) -> bool:
        return (self.pipe_dir / f"fake.{how}").exists()

    def read(self, connection: socket.socket) -> None:
        chunk = b""
        with contextlib.suppress(OSError):
            chunk = connection.recv(65536)
        self.received[connection] += chunk
        first, newline, rest = self.received[connection].partition(b"\n")
        if first.startswith(b"client ") and newline and chunk and connection not in self.clients:
            self.add_client(connection, int(first.split()[1]))
        elif first == b"ui" and newline and not chunk:
            self.answer(connection, rest.decode())
        elif not chunk:
            self.close(connection)

    def add_client(self, connection: socket.socket, pid: int) -> None:
        if self.fails("fault"):
            self.close(connection)
            return
        if self.server is None:
            program = shutil.which("sleep")
            self.server = subprocess.Popen(
                ["nvidia-cuda-mps-server", LONGEST_LIFE_S],
                executable=program,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.clients[connection] = pid
        self.log.write(f"NEW CLIENT {pid}\n")
        connection.sendall(b"connected\n")

    def close(self, connection: socket.socket) -> None:
        self.selector.unregister(connection)
        connection.close()
        del self.received[connection]
        if not self.fails("keeps_clients"):
            self.clients = {one: self.clients[one] for one in self.clients if one.fileno() != -1}
        if not self.clients:
            (self.pipe_dir / "fake.fault").unlink(missing_ok=True)

    def answer(self, connection: socket.socket, commands: str) -> None:
        if self.fails("silent"):
            self.selector.unregister(connection)  # the control program waits
            return
        answers = "".join(self.answer_to(command) for command in commands.splitlines())
        with contextlib.suppress(OSError):
            connection.sendall(b"?\n" if self.fails("nonsense") else answers.encode())
        self.close(connection)

    def answer_to(self, command: str) -> str:
        self.log.write(f"Cmd:{command}\n")
        word, *numbers = command.split()
        if word == "quit" and not self.fails("deaf_to_quit"):
            self.quit()
        if word == "get_server_list":
            return "" if self.server is None else f"{self.server.pid}\n"
        if word in {"get_server_status", "get_client_list", "terminate_client"}:
            if self.server is None or numbers[0] != str(self.server.pid):
                asked = f"{word} {UNKNOWN_SERVER}" + (" 2" if word == "terminate_client" else "")
                answer = recorded("without_clients", asked)
                return answer.replace(f"Server {UNKNOWN_SERVER} ", f"Server {numbers[0]} ")
            return self.answer_of_server(word, numbers)
        if command in RECORDED["without_clients"]:
            return recorded("without_clients", command)
        return recorded("without_clients", "bogus").replace("bogus", command)

    def answer_of_server(self, word: str, numbers: list[str]) -> str:
        if word == "get_server_status":
            return recorded("kill" if self.fails("fault") else "with_clients", f"{word} {SERVER}")
        if word == "get_client_list":
            offset = 1_000_000 if self.fails("other_pids") else 0
            return "".join(f"{pid + offset}\n" for pid in self.clients.values())
        for connection, client in self.clients.items():
            if str(client) == numbers[1] and connection.fileno() != -1:
                with contextlib.suppress(OSError):
                    connection.sendall(b"terminated\n")
                    self.log.write(f"TERMINATED {client}\n")
                return recorded("terminate", f"terminate_client {SERVER} {CLIENT}")
        answer = recorded("with_clients", f"terminate_client {SERVER} {UNKNOWN_CLIENT}")
        return answer.replace(UNKNOWN_CLIENT, numbers[1])

    def quit(self) -> NoReturn:
        if self.server is not None:
            self.server.kill()
            self.server.wait()
        for name in set(RECORDED["pipe_directory"]) - set(RECORDED["pipe_directory_after_quit"]):
            (self.pipe_dir / name).unlink(missing_ok=True)
        os._exit(0)


def start_daemon(pipe_dir: Path, log_dir: Path, *, in_foreground: bool) -> NoReturn:
    lock = (pipe_dir / "control_lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        exit_with(RECORDED["second_daemon"])
    daemon = Daemon(pipe_dir, log_dir)
    if not in_foreground and os.fork():
        os._exit(0)
    daemon.run()


def main() -> None:
    pipe_dir = Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
    options = set(sys.argv[1:])
    if not options:
        exit_with(RECORDED["no_daemon"])
    if options <= {"-f", "-d"}:
        start_daemon(pipe_dir, Path(os.environ["CUDA_MPS_LOG_DIRECTORY"]), in_foreground="-f" in options)
    exit_with(RECORDED["usage"])
