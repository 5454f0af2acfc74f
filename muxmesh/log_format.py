"""The two formats of logs: text for people, and JSON with one object per line for programs that collect logs.

An object has `time` (RFC 3339, UTC), `level`, `logger`, `process` and `message`, `exception` and `stack` as one text
each if there are any, and the fields that the caller passed as ``extra``. Knows no process and opens no file.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from muxmesh.errors import ConfigError
from muxmesh.quoting import OneLineFormatter, quoted

LogFormat = Literal["text", "json"]
VARIABLE = "MUXMESH_LOG_FORMAT"
"""The environment variable for what is logged before mesh.yaml is read, and where its `log_format` is not set."""
OUTPUT_LOGGER = "output"
"""The logger of a line that a process printed by itself, such as one of a library."""

_TEXT = "%(levelname)s %(name)s: %(message)s"
_OF_EVERY_RECORD = {*vars(logging.LogRecord("", 0, "", 0, "", None, None)), "message", "asctime", "taskName"}


def format_of(environment: Mapping[str, str]) -> LogFormat:
    """The format that the environment names; text if it names none. Raises ConfigError for any other value."""
    value = environment.get(VARIABLE) or "text"
    for known in get_args(LogFormat):
        if value == known:
            return "json" if known == "json" else "text"
    raise ConfigError(f"{VARIABLE} is {quoted(value)}; must be text or json")


def formatter_of(log_format: LogFormat, process: str) -> logging.Formatter:
    """The formatter for records of ``process``."""
    return JsonFormatter(process) if log_format == "json" else OneLineFormatter(_TEXT)


class JsonFormatter(logging.Formatter):
    """One JSON object per record, in one line of ASCII. Fields of ``extra`` do not replace those of every object."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        extra = {name: value for name, value in vars(record).items() if name not in _OF_EVERY_RECORD}
        details = {}
        if record.exc_info and record.exc_info[0] is not None:
            details["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            details["stack"] = self.formatStack(record.stack_info)
        return _line(record.created, record.levelname, record.name, self._process, record.getMessage(), extra, details)


def output_as_json(process: str, text: str, now_unix_s: float) -> str:
    """A line that ``process`` has printed: itself if it is a JSON object, else the message of one."""
    if text.startswith("{"):
        try:
            if isinstance(json.loads(text), dict):
                return text
        except (ValueError, RecursionError):
            pass
    return json_line(now_unix_s, "INFO", OUTPUT_LOGGER, process, text)


def json_line(now_unix_s: float, level: str, logger: str, process: str, message: str) -> str:
    """One object as `JsonFormatter` makes it, without a record."""
    return _line(now_unix_s, level, logger, process, message, {}, {})


def _line(
    unix_s: float,
    level: str,
    logger: str,
    process: str,
    message: str,
    extra: Mapping[str, object],
    details: Mapping[str, str],
) -> str:
    time = datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    own = {"time": time, "level": level, "logger": logger, "process": process, "message": message, **details}
    return json.dumps({**own, **{name: _sound(value) for name, value in extra.items()}, **own}, default=str)


def _sound(value: Any) -> Any:
    """``value`` with text for numbers that JSON does not have: NaN and infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _sound(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_sound(part) for part in value]
    return value
