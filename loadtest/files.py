"""Plain or gzipped text files. Errors name the file and the line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from muxmesh.errors import ConfigError

_GZIP = b"\x1f\x8b"


def read_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a UTF-8 file or pipe. Gzip is detected by content, not by name. Raises ConfigError."""
    number = 0
    try:
        with path.open("rb") as raw:  # opened once, as a pipe can be read only once
            is_gzipped = raw.peek(len(_GZIP))[: len(_GZIP)] == _GZIP
            unpacked = gzip.GzipFile(fileobj=raw) if is_gzipped else raw
            with io.TextIOWrapper(unpacked, encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):  # noqa: B007 - the error names the last line read
                    yield line
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: No such file") from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read after line {number}: {error}") from error


def read_csv(path: Path, columns: Sequence[str], hint: str = "") -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line number, row) for each row. Raises ConfigError, with ``hint``, if a column is missing."""
    reader = csv.DictReader(read_lines(path))
    try:
        present = reader.fieldnames or ()
        if missing := [name for name in columns if name not in present]:
            raise ConfigError(f"{path}: has no column {', '.join(missing)}{hint}")
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ConfigError(f"{path}: line {reader.line_num + 1}: not CSV: {error}") from error


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) for each line that is not blank. Raises ConfigError if one is not a JSON object."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: line {number}: not JSON: {error.msg}") from error
        except (ValueError, RecursionError) as error:
            problem = "is nested too deep" if isinstance(error, RecursionError) else "has a number of too many digits"
            raise ConfigError(f"{path}: line {number}: {problem}") from error
        if not isinstance(item, dict):
            raise ConfigError(f"{path}: line {number}: is {type(item).__name__}, not a JSON object")
        yield number, item
