"""Recorded arrivals: Azure's CSV, Mooncake's JSONL with shared prefixes, and plain JSONL with a model column.

It knows the formats. It knows neither prompts nor the models that a server serves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtest.files import read_csv, read_jsonl
from loadtest.lengths import MAX_TOKENS
from muxmesh.errors import ConfigError
from muxmesh.quoting import quoted

MOONCAKE_BLOCK = 512
"""Prompt tokens per hash id of a Mooncake trace."""
_NAMES = {
    "t": "t", "timestamp": "timestamp", "model": "model", "client": "model",
    "n_in": "n_in", "input_length": "n_in", "n_out": "n_out", "output_length": "n_out",
}  # fmt: skip
HELP = (
    "a CSV with columns TIMESTAMP,ContextTokens,GeneratedTokens (Azure), or a JSONL with t (s) or timestamp (ms), "
    "n_in or input_length, n_out or output_length, and optionally model or client, hash_ids (Mooncake)"
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace. ``at_s`` counts from the first arrival.

    ``hash_ids``: one per `MOONCAKE_BLOCK` prompt tokens; requests share a prefix as far as their hash ids agree.
    """

    at_s: float
    num_input: int
    num_output: int
    model: str | None = None
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path) -> list[Arrival]:
    """Returns the arrivals in order of time, the first at 0. Raises ConfigError, which names file and line."""
    is_csv = ".csv" in path.suffixes
    arrivals = sorted(_azure(path) if is_csv else _jsonl(path), key=lambda arrival: arrival.at_s)
    if not arrivals:
        raise ConfigError(f"{path}: has no requests; a trace is {HELP}")
    first_s = arrivals[0].at_s
    return [Arrival(one.at_s - first_s, one.num_input, one.num_output, one.model, one.hash_ids) for one in arrivals]


def _azure(path: Path) -> Iterator[Arrival]:
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    for number, row in read_csv(path, columns, f"; a trace is {HELP}"):
        location = f"{path}: line {number}"
        try:
            at = datetime.fromisoformat(row["TIMESTAMP"]).replace(tzinfo=UTC)
        except (TypeError, ValueError):
            raise ConfigError(f"{location}: TIMESTAMP {quoted(row['TIMESTAMP'])} is not a date and time") from None
        yield Arrival(
            at.timestamp(),
            _count(row, "ContextTokens", location, least=1),
            _count(row, "GeneratedTokens", location, least=0) or 1,
        )


def _jsonl(path: Path) -> Iterator[Arrival]:
    for number, raw in read_jsonl(path):
        location = f"{path}: line {number}"
        item = {_NAMES.get(name, name): value for name, value in raw.items()}
        if "t" not in item and "timestamp" not in item:
            raise ConfigError(f"{location}: has neither t nor timestamp; a trace is {HELP}")
        at_s = _number(item, "t", location) if "t" in item else _number(item, "timestamp", location) / 1000
        hash_ids = item.get("hash_ids", [])
        if not isinstance(hash_ids, list) or not all(isinstance(one, int) for one in hash_ids):
            raise ConfigError(f"{location}: hash_ids is not a list of whole numbers")
        model = item.get("model")
        yield Arrival(
            at_s,
            _count(item, "n_in", location, least=1),
            _count(item, "n_out", location, least=0) or 1,
            None if model is None else str(model),
            tuple(hash_ids),
        )


def _number(item: Mapping[str, Any], name: str, location: str) -> float:
    try:
        value = float(item[name])
    except KeyError:
        raise ConfigError(f"{location}: has no {name}; a trace is {HELP}") from None
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{location}: {name} is {quoted(item[name])}, not a number") from None
    if not math.isfinite(value) or value < 0:
        raise ConfigError(f"{location}: {name} is {value:g}; it must be finite and at least 0")
    return value


def _count(item: Mapping[str, Any], name: str, location: str, least: int) -> int:
    value = _number(item, name, location)
    if not least <= value <= MAX_TOKENS:
        raise ConfigError(f"{location}: {name} is {value:g}; it must be from {least} to {MAX_TOKENS}")
    return int(value)
