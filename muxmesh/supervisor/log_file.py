"""A log file that never stops who writes it: on a full disk its lines are lost, and nothing else."""

from __future__ import annotations

import contextlib
import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path

_log = logging.getLogger("supervisor")
_MAX_BYTES = 10 * 1024 * 1024


class LogFile(RotatingFileHandler):
    """A rotating log file that keeps the last 10 to 20 MB. Each line starts with the time.

    Errors of writing and closing are not raised. The first of them is logged, and again the first after a success.
    """

    def __init__(self, path: Path) -> None:
        """The file is opened with the first line."""
        super().__init__(path, maxBytes=_MAX_BYTES, backupCount=1, delay=True)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._has_failed = self._fails = False

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        self._fails = False
        super().emit(record)
        self._has_failed = self._fails

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by `emit` instead of raising an error."""
        self._fails = True
        if not self._has_failed:
            self._has_failed = True  # before the warning, which may come here again
            _log.warning("%s cannot be written; its lines are lost until it can", self.baseFilename)

    def write_line(self, name: str, line: str) -> None:
        """Adds one line of the output of the process ``name``."""
        self.handle(logging.LogRecord(name, logging.INFO, "", 0, line, None, None))

    def close(self) -> None:
        """See logging.Handler."""
        with contextlib.suppress(OSError):  # what is buffered cannot be written
            super().close()
