"""How errors and logs show what a client or a file contains: in one line, and at most 100 characters of a value.

What is shown has no control characters, line ends or other characters that do not print, whatever the value is.
"""

from __future__ import annotations

import logging
import reprlib
from itertools import islice
from typing import Any

MAX_QUOTED = 100
"""Characters of a value."""


class _Repr(reprlib.Repr):
    """Visits only the first of many or deeply nested parts, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxlong = self.maxother = 3 * MAX_QUOTED  # what is cut here, is cut in the middle

    def repr_int(self, value: int, level: int) -> str:
        try:
            return super().repr_int(value, level)
        except ValueError:  # Python limits the digits that it converts
            return f"an integer of {value.bit_length()} bits"

    def repr_dict(self, value: dict[Any, Any], level: int) -> str:
        if level <= 0:
            return "{...}"
        items = [f"{self.repr1(key, level - 1)}: {self.repr1(value[key], level - 1)}" for key in islice(value, 4)]
        return "{" + ", ".join([*items, "..."] if len(value) > len(items) else items) + "}"


_values = _Repr()


def quoted(value: object) -> str:
    """``repr`` of a value, cut to 100 characters."""
    if isinstance(value, str | bytes):
        return _cut(repr(value[: MAX_QUOTED + 1]))
    return _cut(one_line(_values.repr(value)))


def named(name: str) -> str:
    """A name without quotation marks, cut to 100 characters."""
    return _cut(one_line(name[: MAX_QUOTED + 1]))


def one_line(text: str) -> str:
    """``text`` with characters that do not print escaped as in ``repr``."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def cut_to_bytes(text: str, num_bytes: int) -> str:
    """``text`` in one line and in at most ``num_bytes`` of UTF-8, marked if it is cut."""
    shown = one_line(text[: num_bytes + 1])
    if len(shown.encode()) <= num_bytes:
        return shown
    return shown.encode()[: num_bytes - 3].decode(errors="ignore") + "..."


class OneLineFormatter(logging.Formatter):
    """Escapes line ends in log messages, so that no value looks like a message of its own. Tracebacks keep theirs."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message)
        return super().formatMessage(record)


def _cut(shown: str) -> str:
    return shown if len(shown) <= MAX_QUOTED else f"{shown[:MAX_QUOTED]}..."
