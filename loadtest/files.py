"""Text files as users have them: plain or gzipped, with errors that name the place."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from muxmesh.errors import ConfigError


def open_text(path: Path) -> TextIO:
    """Opens a text file; one whose name ends in .gz is unpacked. Raises ConfigError."""
    try:
        return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not empty. Raises ConfigError for what is no JSON object."""
    with open_text(path) as lines:
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                item = json.loads(line)
                if not isinstance(item, dict):
                    raise ConfigError(f"{path}: line {number}: is {type(item).__name__}, not a JSON object")
                yield number, item
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: line {number}: no JSON: {error.msg}") from error
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: after line {number}: cannot be read: {error}") from error
