"""Log files of bounded size. Writing to them never fails: on a full disk lines are lost, and nothing else."""

from __future__ import annotations

import contextlib
import logging
import os
from logging.handlers import RotatingFileHandler
from pathlib import Path

_log = logging.getLogger("supervisor")
_MAX_BYTES = 10 * 1024 * 1024
_STAT_BLOCK_BYTES = 512
"""Unit of `st_blocks`, whatever the file system."""
WITH_TIME = logging.Formatter("%(asctime)s %(message)s")
"""For lines that do not say when they were written."""
AS_IT_IS = logging.Formatter("%(message)s")


class LogFile(RotatingFileHandler):
    """A rotating log file that keeps the last 10 to 20 MB.

    Errors of writing and closing are not raised. The first of them is logged, and again the first after a success.
    """

    def __init__(self, path: Path, formatter: logging.Formatter = WITH_TIME) -> None:
        """The file is opened with the first line."""
        super().__init__(path, maxBytes=_MAX_BYTES, backupCount=1, delay=True)
        self.setFormatter(formatter)
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


def bound_log(path: Path, max_bytes: int = _MAX_BYTES) -> None:
    """Bounds a log that another program keeps open: once it occupies ``max_bytes``, its end is moved to `PATH.1`.

    The file is emptied in place, so lines that are written at that moment are lost. A program without O_APPEND goes on
    behind a hole, so the space on the disk counts, not the length. Raises nothing.
    """
    with contextlib.suppress(OSError):
        status = path.stat()
        if status.st_blocks * _STAT_BLOCK_BYTES < max_bytes:
            return
        with path.open("rb") as log:
            log.seek(max(0, status.st_size - max_bytes))
            end = log.read(max_bytes)
        with contextlib.suppress(OSError):  # a full disk needs the space all the more
            path.with_name(f"{path.name}.1").write_bytes(end)
        os.truncate(path, 0)
