"""A process that checks drive over a socket: it uses device memory and the device through the product's own code.

A request is JSON with file descriptors beside it; the reply is JSON too. An operation that raises replies with its
error, and the process goes on, so that a check sees what the driver says in each of several processes.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

_MAX_MESSAGE = 1 << 20
START_S = 60.0


class PeerError(Exception):
    """The peer's operation failed; the text is its error."""


class Peer:
    """A running peer.

    ``operations``: `driver` for a process without torch, `torch` for one with it, `engine` for one with a runner,
    `values` for one that also shows what it computes.
    """

    def __init__(self, operations: str, environment: Mapping[str, str] | None = None) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                (sys.executable, "-m", "benchmarks.gpu.peer", operations, str(theirs.fileno())),
                env={**os.environ, **(environment or {})},
                pass_fds=(theirs.fileno(),),
            )
        self._socket = ours

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, operation: str, fds: Sequence[int] = (), timeout_s: float = START_S, **arguments: Any) -> Any:
        """Runs an operation there and returns its result. Raises PeerError, also if the peer has ended."""
        self.tell(operation, fds, **arguments)
        return self.reply(timeout_s)

    def tell(self, operation: str, fds: Sequence[int] = (), **arguments: Any) -> None:
        """Sends an operation, whose `reply` is to be read later."""
        message = json.dumps({"operation": operation, **arguments}).encode()
        try:
            socket.send_fds(self._socket, [message], fds)
        except OSError as error:
            raise PeerError(f"the peer has ended: {error}") from error

    def reply(self, timeout_s: float = START_S) -> Any:
        """The result of the oldest operation without a reply; a descriptor that it made is its value "fd"."""
        ready, _, _ = select.select([self._socket], [], [], timeout_s)
        if not ready:
            raise PeerError(f"no reply in {timeout_s:g} s")
        try:
            message, fds, _, _ = socket.recv_fds(self._socket, _MAX_MESSAGE, 4)
        except OSError:
            message, fds = b"", []
        if not message:
            raise PeerError(f"the peer ended with {self.process.wait()}")
        content = json.loads(message)
        if "error" in content:
            raise PeerError(content["error"])
        result = content["result"]
        return {**result, "fd": fds[0]} if fds else result

    def kill(self) -> None:
        """Ends the process with SIGKILL and waits for it."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._socket.close()

    def close(self) -> None:
        """Lets the process end by itself; kills it if it does not."""
        self._socket.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.close()


def serve(operations: Any, connection: socket.socket) -> None:
    """Runs operations until the other side closes the connection."""
    while True:
        try:
            message, fds, _, _ = socket.recv_fds(connection, _MAX_MESSAGE, 4)
        except ConnectionResetError:  # the check has ended with a message that it did not read
            return
        if not message:
            return
        arguments = json.loads(message)
        try:
            result = operations.run(arguments.pop("operation"), arguments, fds)
            made = [result.pop("fd")] if isinstance(result, dict) and "fd" in result else []
            socket.send_fds(connection, [json.dumps({"result": result}).encode()], made)
            for fd in made:
                os.close(fd)
        except Exception as error:  # noqa: BLE001 - the check judges it
            where = "".join(traceback.format_tb(error.__traceback__)[-3:])
            text = f"{type(error).__name__}: {str(error)[:2000]}\n{where[-1500:]}"
            connection.send(json.dumps({"error": text}).encode())


def main() -> None:
    """``python -m benchmarks.gpu.peer driver|torch|engine|values FD``."""
    kind, fd = sys.argv[1], int(sys.argv[2])
    module, name = {
        "driver": ("benchmarks.gpu.driver_operations", "DriverOperations"),
        "torch": ("benchmarks.gpu.torch_operations", "TorchOperations"),
        "engine": ("benchmarks.gpu.engine_operations", "EngineOperations"),
        "values": ("benchmarks.gpu.value_operations", "ValueOperations"),
    }[kind]
    operations = getattr(importlib.import_module(module), name)()
    serve(operations, socket.socket(fileno=fd))


if __name__ == "__main__":
    main()
