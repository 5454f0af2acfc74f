"""What `muxmesh up` and `muxmesh prepare` print, as text for people or as JSON for collectors of logs.

The result goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TextIO

from muxmesh.clock import Clock
from muxmesh.errors import MeshError
from muxmesh.lifecycle import configure_logging
from muxmesh.log_format import LogFormat, json_line

_LOGGER = "muxmesh"


class OperatorMessages:
    """Prints at once. ``shows_lines``: whether lines of other processes are printed; they are in log files anyway."""

    def __init__(self, process: str, clock: Clock, shows_lines: bool = False) -> None:
        """``process``: the name of this process in JSON."""
        self.log_format: LogFormat = "text"
        self._process = process
        self._clock = clock
        self._shows_lines = shows_lines

    @property
    def are_json(self) -> bool:
        return self.log_format == "json"

    def use(self, log_format: LogFormat | None) -> None:
        """Sets the format, also that of logs. None: the one that the environment names.

        Raises ConfigError if that is neither text nor json.
        """
        self.log_format = configure_logging(logging.WARNING, log_format, self._process)

    def run(self, command: Callable[[], int]) -> int:
        """Runs ``command`` and returns its exit code. The format is that of the environment until ``command`` sets it.

        In text, MeshError and OSError are raised; in JSON they are printed as an object, and the exit code is 1.
        """
        self.use(None)
        try:
            return command()
        except (MeshError, OSError) as error:
            if not self.are_json or isinstance(error, BrokenPipeError):
                raise
            self._print("ERROR", str(error), "", sys.stderr)
            return 1

    def result(self, text: str) -> None:
        self._print("INFO", text, "", sys.stdout)

    def progress(self, text: str) -> None:
        self._print("INFO", text, "", sys.stderr)

    def notice(self, text: str) -> None:
        """Prints what an operator should know or mend."""
        self._print("WARNING", text, "muxmesh: ", sys.stderr)

    def show_line(self, process: str, line: str) -> None:
        """Prints a line of a process. Those of Redis are in its log file only. A JSON object names its process."""
        if self._shows_lines and process != "redis":
            _write_line(line if self.are_json else f"{process} | {line}", sys.stderr)

    def _print(self, level: str, text: str, prefix: str, stream: TextIO) -> None:
        if self.are_json:
            _write_line(json_line(self._clock.unix_s(), level, _LOGGER, self._process, text), stream)
        else:
            _write_line(f"{prefix}{text}", stream)


def _write_line(line: str, stream: TextIO) -> None:
    """In one piece, unlike `print`: with `2>&1` nothing of the other stream comes between a line and its end."""
    stream.write(f"{line}\n")
    stream.flush()
