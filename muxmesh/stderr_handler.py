"""The handler of logs on stderr: a reader that does not read them stops no service.

A pipe or a socket holds some ten KiB. Without this, a supervisor that is stopped, or a collector of logs that hangs,
would stop every service that logs a line for each request.
"""

from __future__ import annotations

import logging
import select
from typing import TextIO

_LONGEST_WAIT_MS = 50
"""For a reader that is only slow. Once it was too slow, nothing waits for it until it has read again."""


class StderrHandler(logging.StreamHandler[TextIO]):
    """Drops records while the stream takes no more, and logs their number as soon as it does."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._num_dropped = 0
        self._poll: select.poll | None = select.poll()
        try:
            self._poll.register(stream.fileno(), select.POLLOUT)
        except (OSError, ValueError):  # the stream is no file
            self._poll = None

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the record, or drops it. Blocks for `_LONGEST_WAIT_MS` at most, if the record is not long."""
        if not self._is_writable():
            self._num_dropped += 1
            return
        if self._num_dropped:
            message = f"{self._num_dropped} log records were dropped, because nothing read them"
            self._num_dropped = 0
            super().emit(logging.LogRecord(__name__, logging.WARNING, __file__, 0, message, None, None))
        super().emit(record)

    def _is_writable(self) -> bool:
        """Whether a record of up to 4 KiB can be written at once."""
        return self._poll is None or bool(self._poll.poll(0 if self._num_dropped else _LONGEST_WAIT_MS))
