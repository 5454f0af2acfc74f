"""Standard input, output and error as the commands need them: always open, and able to take any text."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import TextIO


def prepare() -> None:
    """Opens those of the three streams that are closed to /dev/null, and lets text pass that an encoding lacks."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            _open_null(number)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - stays open
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Writes out what is buffered. Raises BrokenPipeError if the reader has exited, OSError if the disk is full."""
    sys.stdout.flush()
    sys.stderr.flush()


def drop() -> None:
    """Sends what is left to be written nowhere, so that the interpreter reports no error when it exits."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _open_null(stream.fileno())


def can_encode_all(stream: TextIO) -> bool:
    """True if any character can be written to ``stream``."""
    return (stream.encoding or "").lower().replace("-", "") in ("utf8", "utf16", "utf32")


def _open_null(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null == number:
        os.set_inheritable(null, True)
    else:
        os.dup2(null, number)
        os.close(null)
