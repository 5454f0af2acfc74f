"""Output for the terminal that never makes its writer wait: not for a reader that is stopped, nor for one that is gone.

A full pipe blocks a thread of its own. What does not fit into its queue is dropped and counted.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import select
import threading

_MAX_TEXTS = 2000
_CLOSE_S = 1.0
"""Time limit for what is queued: half of it until the queue has a free entry, half for the rest."""


class Console(io.TextIOBase):
    """A text stream that writes to one file descriptor in the background."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._texts: queue.Queue[bytes | None] = queue.Queue(_MAX_TEXTS)
        self._num_dropped = 0
        self._is_given_up = False
        self.thread = threading.Thread(target=self._run, name="console", daemon=True)
        self.thread.start()

    def write(self, text: str) -> int:
        """Queues ``text``. Never waits and raises nothing, not even after `close`, when it has no effect."""
        try:
            self._texts.put_nowait(text.encode(errors="replace"))
        except queue.Full:
            self._num_dropped += 1
        return len(text)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def flush(self) -> None:
        """Does nothing: text is written as soon as the reader takes it."""

    def close(self) -> None:
        """Waits up to a second for what is queued."""
        if self.closed:
            return
        super().close()
        with contextlib.suppress(queue.Full):
            self._texts.put(None, timeout=_CLOSE_S / 2)
            self.thread.join(_CLOSE_S / 2)
        self._is_given_up = True

    def _run(self) -> None:
        while (text := self._texts.get()) is not None and not self._is_given_up:
            self._write(text)
            if self._num_dropped and self._texts.empty():
                num_dropped, self._num_dropped = self._num_dropped, 0
                self._write(b"(%d pieces of output were dropped because they were not read in time)\n" % num_dropped)

    def _write(self, content: bytes) -> None:
        while content and not self._is_given_up:
            try:
                content = content[os.write(self._fd, content) :]
            except BlockingIOError:  # another process made the terminal non-blocking
                select.select([], [self._fd], [])
            except OSError:  # the reader is gone, or the disk is full
                return
