"""What the commands share: directories of this machine, progress bars, JSON output, dates, checks of output files."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from muxmesh.cli.standard_streams import can_encode_all
from muxmesh.clock import SystemClock
from muxmesh.errors import ConfigError
from muxmesh.local_path import local_path
from muxmesh.rpc.limits import MAX_MESSAGE_BYTES

_BAR_WIDTH = 32
_ESCAPED_CONTROLS = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}


def cache_dir() -> Path:
    """Returns MUXMESH_CACHE_DIR if it is set, else `muxmesh` in the user's cache directory."""
    if chosen := os.environ.get("MUXMESH_CACHE_DIR"):
        return Path(os.path.expanduser(chosen))  # unlike that of Path, it accepts any text
    return Path(os.environ.get("XDG_CACHE_HOME") or _home("MUXMESH_CACHE_DIR") / ".cache") / "muxmesh"


def default_state_dir() -> Path:
    """Returns MUXMESH_STATE_DIR if it is set, else `muxmesh` in the user's state directory."""
    if chosen := os.environ.get("MUXMESH_STATE_DIR"):
        return Path(os.path.expanduser(chosen))
    return Path(os.environ.get("XDG_STATE_HOME") or _home("MUXMESH_STATE_DIR") / ".local" / "state") / "muxmesh"


def api_key() -> str | None:
    """The API key of the caller: MUXMESH_API_KEY, since what stands on a command line is seen by other users."""
    return os.environ.get("MUXMESH_API_KEY")


def state_dir_of(given: Path | None) -> Path:
    """The state directory of a command: ``given`` by --state-dir, else the default."""
    return local_path(str(given or default_state_dir()), current_dir())


def current_dir() -> Path:
    """The current directory. Raises ConfigError if it has been deleted."""
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        raise ConfigError("the current directory has been deleted; change to another one") from error


def source_dir(config: Path | None) -> Path:
    """The folder that relative paths in ``config`` start from: that of the file; for a pipe, or None, the current one.

    Raises ConfigError if that is the current one, and it has been deleted.
    """
    if config is not None and config.is_absolute():
        real = os.path.realpath(config)
    else:
        real = os.path.realpath(current_dir() / (config or ""))
    return Path(real).parent if os.path.isfile(real) else current_dir()


def _home(instead: str) -> Path:
    """The user's home directory. Raises ConfigError with the variable that may be set ``instead``."""
    try:
        return Path.home()
    except RuntimeError as error:  # HOME is not set, and the user is in no database
        raise ConfigError(f"{error} Set HOME or {instead}") from error


def read_all() -> str:
    """Returns all of standard input. Raises ConfigError if it is not UTF-8, or more than a request holds."""
    content = sys.stdin.buffer.read(MAX_MESSAGE_BYTES + 1)
    if len(content) > MAX_MESSAGE_BYTES:
        raise ConfigError(f"standard input: has more than {MAX_MESSAGE_BYTES} bytes, which no request holds")
    return _decoded(content)


def read_line() -> str | None:
    """Returns the next line of standard input, or None at its end. Raises ConfigError as `read_all` does."""
    line = sys.stdin.buffer.readline(MAX_MESSAGE_BYTES + 1)
    if len(line) > MAX_MESSAGE_BYTES:
        raise ConfigError(f"standard input: a line has more than {MAX_MESSAGE_BYTES} bytes, which no request holds")
    return _decoded(line).rstrip("\r\n") if line else None


def _decoded(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        byte, offset = content[error.start], error.start
        raise ConfigError(f"standard input: is not UTF-8 text: byte 0x{byte:02x} at offset {offset}") from None


def print_json(content: Any) -> None:
    """Prints one JSON document: indented on a terminal, one line elsewhere. All control characters are escaped.

    A number that is not finite is null, since JSON has none.
    """
    indent = 2 if sys.stdout.isatty() else None
    text = json.dumps(_finite(content), ensure_ascii=not can_encode_all(sys.stdout), indent=indent, allow_nan=False)
    print(text.translate(_ESCAPED_CONTROLS), flush=True)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    return [_finite(one) for one in content] if isinstance(content, list | tuple) else content


class ProgressBar:
    """Progress on stderr: a bar on a terminal, one line per quarter elsewhere.

    ``print_line``: gets these lines instead, also on a terminal.
    """

    def __init__(self, label: str, print_line: Callable[[str], None] | None = None) -> None:
        self._label = label
        self._print_line = print_line
        self._shown: tuple[str, int, str] | None = None

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
        """Shows that ``done`` of ``total`` is done, in bytes if ``total`` is above a million.

        ``note``: what else is shown. On a terminal the line is written again when it changes.
        """
        terminal = self._print_line is None and sys.stderr.isatty()
        steps = 100 if terminal else 4
        part = (phase, done * steps // max(total, 1), note if terminal else "")
        if part == self._shown:
            return
        self._shown = part
        amount = f"{done / 1e6:.1f}/{total / 1e6:.1f} MB" if total > 1_000_000 else f"{done}/{total}"
        amount += f", {note}" if note else ""
        if terminal:
            filled = _BAR_WIDTH * done // max(total, 1)
            bar = "#" * filled + "-" * (_BAR_WIDTH - filled)
            print(f"\r{self._label}: {phase} [{bar}] {amount}\x1b[K", end="", file=sys.stderr, flush=True)
            if done >= total:
                print(file=sys.stderr)
        elif self._print_line is not None:
            self._print_line(f"{self._label}: {phase} {amount}")
        else:
            print(f"{self._label}: {phase} {amount}", file=sys.stderr, flush=True)


def date_now() -> str:
    """The date and time in UTC, to the second, as reports and profiles have it (ISO 8601)."""
    return datetime.fromtimestamp(SystemClock().unix_s(), UTC).isoformat(timespec="seconds")


def refuse_unwritable(*paths: Path | None) -> None:
    """Raises ConfigError for the first path that cannot be written. It is called before long work; None is skipped."""
    for path in filter(None, paths):
        if not path.parent.is_dir():
            raise ConfigError(f"{path}: the folder {path.parent} does not exist")
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder; a file name is needed")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigError(f"{path}: permission to write is missing")
