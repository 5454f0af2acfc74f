"""A program on a terminal of its own, for tests that type and read as a person does."""

from __future__ import annotations

import codecs
import os
import pty
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TIMEOUT_S = 40.0


class Terminal:
    """The keyboard and screen of a running program."""

    def __init__(self, process: subprocess.Popen[bytes], controller: int) -> None:
        self._process = process
        self._controller = controller
        self._unread = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def type(self, keys: str) -> None:
        """Types ``keys``; "\\r" is the enter key and "\\x03" is Ctrl-C."""
        os.write(self._controller, keys.encode())

    def read_until(self, text: str) -> str:
        """Returns what the program writes up to and with ``text``, from where the last call ended."""
        while text not in self._unread:
            self._unread += self._read()
        before, _, self._unread = self._unread.partition(text)
        return before + text

    def read_all(self) -> str:
        """Returns what the program writes until it ends."""
        try:
            while True:
                self._unread += self._read()
        except EOFError:
            return self._unread

    def exit_code(self) -> int:
        """Waits until the program ends."""
        self.read_all()
        return self._process.wait(_TIMEOUT_S)

    def _read(self) -> str:
        if not select.select([self._controller], [], [], _TIMEOUT_S)[0]:
            raise AssertionError(f"the program has written nothing more, after {self._unread!r}")
        try:
            written = os.read(self._controller, 1 << 16)
        except OSError:  # Linux reports the end of the program so
            written = b""
        if not written:
            raise EOFError(f"the program ended, after {self._unread!r}")
        return self._decoder.decode(written)


@contextmanager
def on_terminal(*arguments: str, **environment: str) -> Iterator[Terminal]:
    """Runs `muxmesh` with a terminal as its standard input, output and error."""
    controller, terminal = pty.openpty()
    # The first terminal that a new session opens becomes its own, so that Ctrl-C on it becomes SIGINT.
    begin = ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(terminal)]
    process = subprocess.Popen(
        [*begin, sys.executable, "-m", "muxmesh", *arguments],
        stdin=terminal,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm", **environment},
    )
    os.close(terminal)
    try:
        yield Terminal(process, controller)
    finally:
        process.kill()
        process.wait()
        os.close(controller)
