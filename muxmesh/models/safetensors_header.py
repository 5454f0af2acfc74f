"""Reads and checks the header of a safetensors file. Reads no tensor.

The format is an 8-byte little-endian header length, the header as JSON, then the data
(https://huggingface.co/docs/safetensors). As in the `safetensors` package, the tensors have to cover the data without
gaps and overlaps.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muxmesh.errors import ModelUnsupported
from muxmesh.models.model_files import described, readable
from muxmesh.quoting import named

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the `safetensors` package."""
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "F4": 4,
}  # fmt: skip
_MAX_DIMS = 8
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor in a file: its bytes are those from ``first`` up to ``last`` of the whole file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a file by name. Raises ModelUnsupported, which names the file and what is wrong with it."""
    with readable(path):
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
                raise _damaged(path, f"has {size} bytes, its header claims {length}")
            if length > _MAX_HEADER_BYTES:
                raise _damaged(path, f"its header is {length} bytes long; at most {_MAX_HEADER_BYTES}")
            text = file.read(length)
    start = _LENGTH_BYTES + length
    entries = {name: _entry(path, name, entry, start) for name, entry in _parsed(path, text).items()}
    _check_cover(path, entries, start, size)
    return entries


def _damaged(path: Path, problem: str) -> ModelUnsupported:
    return ModelUnsupported(f"{path}: not a safetensors file, or damaged: {problem}")


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, f"its header is {described(header)}, not an object")
    header.pop(_METADATA, None)
    return header


def _entry(path: Path, name: str, entry: Any, start: int) -> TensorEntry:
    """One tensor; ``start`` is where the data begins."""
    shown = named(name)
    if not isinstance(entry, dict):
        raise _damaged(path, f"{shown}: is {described(entry)}, not an object")
    dtype, shape, offsets = (entry.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        raise _damaged(path, f"{shown}: dtype: is {described(dtype)}; must be a string")
    sizes, span = _sizes(path, f"{shown}: shape", shape), _sizes(path, f"{shown}: data_offsets", offsets)
    if len(span) != 2 or span[0] > span[1]:
        raise _damaged(path, f"{shown}: data_offsets: must be two ascending numbers")
    needed = math.prod(sizes) * _BITS.get(dtype, 0)
    if dtype in _BITS and needed != (span[1] - span[0]) * 8:
        raise _damaged(
            path,
            f"{shown}: data_offsets: span {span[1] - span[0]} bytes, the shape needs {described(needed // 8)}",
        )
    return TensorEntry(path, dtype, sizes, start + span[0], start + span[1])


def _sizes(path: Path, field: str, numbers: object) -> tuple[int, ...]:
    if isinstance(numbers, list) and len(numbers) <= _MAX_DIMS:
        sizes = tuple(one for one in numbers if type(one) is int and 0 <= one < 1 << 62)
        if len(sizes) == len(numbers):
            return sizes
    raise _damaged(path, f"{field}: must be a list of at most {_MAX_DIMS} whole numbers from 0 on")


def _check_cover(path: Path, entries: dict[str, TensorEntry], start: int, size: int) -> None:
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].first, item[1].last)):
        if entry.first != at:
            problem = "overlap those of another tensor" if entry.first < at else "leave a gap before them"
            raise _damaged(path, f"{named(name)}: data_offsets: {problem}")
        at = entry.last
    if at != size:
        raise _damaged(path, f"has {size} bytes, its tensors end at {at}" + ("; it is truncated" if at > size else ""))
