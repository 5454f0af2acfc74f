"""A model's chat template, rendered in a process of its own within a budget of time, memory and output.

Whatever a template does, and whatever messages it gets, costs the router nothing but the wait of that request. Knows
the budget and the process; `muxmesh.models.template_process` knows jinja2.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from muxmesh.clock import Clock, SystemClock
from muxmesh.errors import InvalidRequest, Unavailable
from muxmesh.quoting import cut_to_bytes

_MODULE = "muxmesh.models.template_process"
_LENGTH_BYTES = 4
_MAX_ERROR_BYTES = 4096
"""Of a response without text: more than the process ever sends."""
_EXIT_S = 5.0
_START_S = 60.0
"""Of a new process. Only CPU time counts for the budget of compiling."""
_MAX_REASON_BYTES = 200
"""Of the words of a template, which may quote the conversation."""


@dataclass(frozen=True, slots=True)
class TemplateBudget:
    """What compiling a template, and each rendering, may take.

    ``wall_s`` ends a process that gets no CPU time for a rendering, such as a stopped one. The output may have
    ``min_output_bytes``, or ``output_ratio`` times the bytes of the messages if that is more.
    """

    cpu_s: float = 1.0
    wall_s: float = 10.0
    memory_bytes: int = 256 << 20
    min_output_bytes: int = 1 << 20
    output_ratio: int = 4


DEFAULT_BUDGET = TemplateBudget()


class ChatTemplate:
    """A template and the process that renders it, which starts when it is needed. Thread-safe.

    One thread does everything, and owns the process: the kernel ends a process with the thread that started it.

    ``variables``: what a template finds besides the messages, such as `bos_token`. ``problem``: why there is no usable
    source; `render` refuses with it.
    """

    def __init__(
        self,
        source: str,
        variables: Mapping[str, str],
        problem: str | None = None,
        clock: Clock | None = None,
        budget: TemplateBudget = DEFAULT_BUDGET,
    ) -> None:
        self._source = source
        self._variables = variables
        self._problem = problem
        self._clock = clock or SystemClock()
        self._budget = budget
        self._process: _Process | None = None
        self._is_compiled = False
        self._is_checked = problem is not None
        self._thread = ThreadPoolExecutor(1, "chat-template")

    def start(self) -> None:
        """Starts the process, and does not wait for it. Raises Unavailable."""
        self._thread.submit(self._start).result()

    @property
    def problem(self) -> str | None:
        """Why the template cannot be used, in one line; None if it can.

        Waits only for the first compilation, never for a rendering. Raises Unavailable.
        """
        if not self._is_checked:
            self._thread.submit(self._compile).result()
        return self._problem

    def submit(self, messages: Sequence[Mapping[str, str]]) -> Future[str]:
        """`render` without waiting. A rendering that is cancelled before it begins is left out."""
        return self._thread.submit(self._rendered, messages)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Renders a conversation as text that ends where the reply of the assistant begins.

        Raises InvalidRequest if the template is unusable (`chat`), or if it rejects the conversation or exceeds its
        budget (`chat.messages`); Unavailable if no process can be started.
        """
        return self.submit(messages).result()

    def _start(self) -> None:
        if self._problem is None and self._process is None:
            self._process = self._started()

    def _rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        conversation = json.dumps(messages).encode()
        max_bytes = max(self._budget.min_output_bytes, self._budget.output_ratio * len(conversation))
        request = {
            "variables": {
                "messages": messages,
                "tools": None,
                "documents": None,
                "add_generation_prompt": True,
                **self._variables,
            },
            "now_unix_s": self._clock.unix_s(),
            "max_bytes": max_bytes,
        }
        response = self._exchanged(json.dumps(request).encode(), max_bytes)
        if response[:1] == b"e":
            reason = cut_to_bytes(response[1:].decode(), _MAX_REASON_BYTES)
            raise InvalidRequest("chat.messages", f"rejected by the model's chat template: {reason}")
        return response[1:].decode()

    def _exchanged(self, request: bytes, max_bytes: int) -> bytes:
        """The response of the process. A process that ended by itself, not for this request, is replaced once."""
        for is_last in (False, True):
            process = self._compiled()
            try:
                return process.exchange(request, self._budget.wall_s, max_bytes)
            except _Ended as ended:
                self._process = None
                if ended.used_up or is_last:
                    raise InvalidRequest(
                        "chat.messages", f"the model's chat template {self._excess(ended)}; it was stopped"
                    ) from ended
        raise AssertionError("the loop returns or raises")

    def _compiled(self) -> _Process:
        """The process, as soon as it has compiled the template. Raises InvalidRequest (`chat`), Unavailable."""
        self._compile()
        if self._process is None:
            raise InvalidRequest("chat", f"{self._problem}; send `text` or `token_ids`")
        return self._process

    def _compile(self) -> None:
        """Waits until a process has compiled the template, or the problem of the template is known."""
        if self._problem is not None or (self._process is not None and self._is_compiled):
            return
        self._process = self._process or self._started()
        try:
            response = self._process.receive(_START_S)
        except _Ended as ended:
            self._process = None
            if ended.code == -signal.SIGKILL:  # not for anything that the template did
                raise Unavailable("the process for chat templates was killed or did not start in time") from ended
            response = b"e" + self._excess(ended).encode()
        if response[:1] == b"e":
            reason = cut_to_bytes(response[1:].decode(), _MAX_REASON_BYTES)
            self._problem = f"the model's chat template cannot be compiled: {reason}"
            self._process = None
        self._is_compiled = self._is_checked = True

    def _started(self) -> _Process:
        self._is_compiled = False
        budget = self._budget
        start = {"template": self._source, "cpu_s": budget.cpu_s, "memory_bytes": budget.memory_bytes}
        process = _Process()
        try:
            process.send(json.dumps(start).encode(), budget.wall_s)
        except _Ended as ended:
            raise Unavailable(f"the process for chat templates ended as it started ({ended.code})") from ended
        return process

    def _excess(self, ended: _Ended) -> str:
        if ended.code == -signal.SIGPROF:
            return f"took more than {self._budget.cpu_s:g} s of CPU time"
        if ended.used_up:
            return f"took more than {self._budget.wall_s:g} s"
        return f"ended its process ({_code_name(ended.code)})"


class _Ended(Exception):
    """The process has ended, with exit ``code``; ``used_up``: because of a budget."""

    def __init__(self, code: int, used_up: bool) -> None:
        super().__init__(f"exit code {code}")
        self.code = code
        self.used_up = used_up


class _Process:
    """A running process and the socket to it. It ends with this object, and with the thread that starts it."""

    def __init__(self) -> None:
        """Raises Unavailable if it cannot be started."""
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                command = [sys.executable, "-m", _MODULE, str(theirs.fileno()), str(os.getpid())]
                self._popen = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        except OSError as error:
            raise Unavailable(f"the process for chat templates cannot be started: {error}") from error
        self._socket = ours
        self._end = weakref.finalize(self, _end, self._popen, ours)

    def exchange(self, message: bytes, wall_s: float, max_bytes: int) -> bytes:
        """Sends a message; returns the response, with at most ``max_bytes`` of text. Raises _Ended."""
        self.send(message, wall_s)
        return self.receive(wall_s, max_bytes)

    def send(self, message: bytes, wall_s: float) -> None:
        """Raises _Ended."""
        self._socket.settimeout(wall_s)
        try:
            self._socket.sendall(len(message).to_bytes(_LENGTH_BYTES) + message)
        except OSError as error:
            raise self._ended(isinstance(error, TimeoutError)) from error

    def receive(self, wall_s: float, max_bytes: int = 0) -> bytes:
        """Raises _Ended, also for a length that no sound process sends."""
        self._socket.settimeout(wall_s)
        length = int.from_bytes(self._received(_LENGTH_BYTES))
        if length > max(max_bytes + 1, _MAX_ERROR_BYTES):
            raise self._ended(timed_out=False)
        return self._received(length)

    def _received(self, size: int) -> bytes:
        received = bytearray()
        while len(received) < size:
            try:
                part = self._socket.recv(min(size - len(received), 1 << 20))
            except OSError as error:
                raise self._ended(isinstance(error, TimeoutError)) from error
            if not part:
                raise self._ended(timed_out=False)
            received += part
        return bytes(received)

    def _ended(self, timed_out: bool) -> _Ended:
        """Ends the process; returns how it ended."""
        if timed_out:
            self._end()
            return _Ended(-signal.SIGKILL, used_up=True)
        self._socket.close()
        try:
            code = self._popen.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        self._end()
        return _Ended(code, used_up=code == -signal.SIGPROF)


def _end(popen: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    popen.kill()
    popen.wait()


def _code_name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
