"""Reads a model's side files, such as its JSON files, whatever is in them. Knows no field of any file.

Every error is one line, `FILE[:LINE]: problem`. A file is read only if it is a regular file of a size that its kind may
have, so neither a FIFO nor a lying size stops or fills a process.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from muxmesh.errors import ModelUnsupported
from muxmesh.quoting import quoted

MAX_CONFIG_BYTES = 16 << 20
"""Of configs, maps of special tokens and chat templates. The largest known ones are below 1 MiB."""
MAX_TOKENIZER_BYTES = 512 << 20
_LFS = b"version https://git-lfs.github.com/spec/"
_BOM = b"\xef\xbb\xbf"


def read_file(path: Path, max_bytes: int) -> bytes | None:
    """Reads a regular file; None if there is none. Raises ModelUnsupported if it cannot be read or is no such file."""
    if not os.path.lexists(path):
        return None
    with readable(path):
        if (size := path.stat().st_size) > max_bytes:
            raise ModelUnsupported(f"{path}: is {size} bytes long; at most {max_bytes}")
        return path.read_bytes()


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raises ModelUnsupported if ``path`` is no regular file with content of its own, or the block cannot read it."""
    try:
        if (problem := _file_problem(path)) is not None:
            raise ModelUnsupported(f"{path}: {problem}")
        yield
    except OSError as error:
        raise ModelUnsupported(f"{path}: cannot be read: {error.strerror}") from error


def _file_problem(path: Path) -> str | None:
    """What is wrong with a path that should be a regular file with content of its own, if any. Raises OSError."""
    if not path.exists():
        return "is a broken symbolic link" if path.is_symlink() else "does not exist"
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        return "is a directory, not a file" if stat.S_ISDIR(mode) else "is not a regular file"
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            return "is a git-lfs pointer, not the file itself; run `git lfs pull` in its repository"
    return None


def read_text(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> str | None:
    """Reads a text file as transformers does: UTF-8, any line ends. None if there is none. Raises ModelUnsupported."""
    content = read_file(path, max_bytes)
    if content is None:
        return None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ModelUnsupported(
            f"{path}:{line}: is not UTF-8: byte 0x{content[error.start]:02x} at {error.start}"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json_object(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any] | None:
    """Reads one of a model's JSON files; None if it does not exist. Raises ModelUnsupported if it is damaged.

    As in transformers, a file may not begin with a byte order mark, and of equal keys the last one counts.
    """
    text = read_text(path, max_bytes)
    if text is None:
        return None
    if not text.strip():
        raise ModelUnsupported(f"{path}: is empty; a JSON object is needed")
    if text.startswith(_BOM.decode()):
        raise ModelUnsupported(f"{path}:1: begins with a byte order mark; save it as UTF-8 without one")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelUnsupported(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ModelUnsupported(f"{path}: not JSON: is nested too deeply") from error
    except ValueError as error:  # Python limits the digits of numbers
        raise ModelUnsupported(f"{path}: not JSON: has a number of thousands of digits") from error
    if not isinstance(content, dict):
        raise ModelUnsupported(f"{path}: is {described(content)}, not a JSON object")
    return content


def described(value: object) -> str:
    """A value of a file in an error: a number or a string as it is, up to 100 characters, else its kind."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    return quoted(value)
