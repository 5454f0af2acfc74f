"""Recorded arrivals: Azure's CSV, Mooncake's JSONL with shared prefixes, and plain JSONL with a model column."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtest.files import read_jsonl, read_lines
from muxmesh.errors import ConfigError

MOONCAKE_BLOCK = 512
"""Tokens that one hash id of a Mooncake trace stands for."""
_NAMES = {
    "t": "t", "timestamp": "timestamp", "model": "model", "client": "model",
    "n_in": "n_in", "input_length": "n_in", "n_out": "n_out", "output_length": "n_out",
}  # fmt: skip
HELP = (
    "a CSV with columns TIMESTAMP,ContextTokens,GeneratedTokens (Azure), or a JSONL with t (s) or timestamp (ms), "
    "n_in or input_length, n_out or output_length, and perhaps model or client, hash_ids (Mooncake)"
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace; ``at_s`` counts from the first. ``hash_ids`` name its prefix in blocks."""

    at_s: float
    num_input: int
    num_output: int
    model: str | None = None
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path) -> list[Arrival]:
    """The arrivals in order of time, the first at 0. Raises ConfigError that names file, line and what is wrong."""
    is_csv = ".csv" in path.suffixes
    arrivals = sorted(_azure(path) if is_csv else _jsonl(path), key=lambda arrival: arrival.at_s)
    if not arrivals:
        raise ConfigError(f"{path}: has no requests; a trace is {HELP}")
    first_s = arrivals[0].at_s
    return [Arrival(one.at_s - first_s, one.num_input, one.num_output, one.model, one.hash_ids) for one in arrivals]


def _azure(path: Path) -> Iterator[Arrival]:
    reader = csv.DictReader(read_lines(path))
    wanted = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    if missing := [name for name in wanted if name not in (reader.fieldnames or ())]:
        raise ConfigError(f"{path}: has no column {', '.join(missing)}; a trace is {HELP}")
    for row in reader:
        place = f"{path}: line {reader.line_num}"
        try:
            at = datetime.fromisoformat(row["TIMESTAMP"][:26]).replace(tzinfo=UTC)
        except (TypeError, ValueError):
            raise ConfigError(f"{place}: TIMESTAMP {row['TIMESTAMP']!r} is no date and time") from None
        yield Arrival(
            at.timestamp(),
            _count(row, "ContextTokens", place, least=1),
            _count(row, "GeneratedTokens", place, least=0) or 1,
        )


def _jsonl(path: Path) -> Iterator[Arrival]:
    for number, raw in read_jsonl(path):
        place = f"{path}: line {number}"
        item = {_NAMES.get(name, name): value for name, value in raw.items()}
        if "t" not in item and "timestamp" not in item:
            raise ConfigError(f"{place}: has neither t nor timestamp; a trace is {HELP}")
        at_s = _number(item, "t", place) if "t" in item else _number(item, "timestamp", place) / 1000
        hash_ids = item.get("hash_ids", [])
        if not isinstance(hash_ids, list) or not all(isinstance(one, int) for one in hash_ids):
            raise ConfigError(f"{place}: hash_ids is no list of whole numbers")
        model = item.get("model")
        yield Arrival(
            at_s,
            _count(item, "n_in", place, least=1),
            _count(item, "n_out", place, least=0) or 1,
            None if model is None else str(model),
            tuple(hash_ids),
        )


def _number(item: Mapping[str, Any], name: str, place: str) -> float:
    try:
        value = float(item[name])
    except KeyError:
        raise ConfigError(f"{place}: has no {name}; a trace is {HELP}") from None
    except (TypeError, ValueError):
        raise ConfigError(f"{place}: {name} is {item[name]!r}, no number") from None
    if not math.isfinite(value) or value < 0:
        raise ConfigError(f"{place}: {name} is {value:g}; at least 0")
    return value


def _count(item: Mapping[str, Any], name: str, place: str, least: int) -> int:
    value = _number(item, name, place)
    if value < least:
        raise ConfigError(f"{place}: {name} is {value:g}; at least {least}")
    return int(value)
