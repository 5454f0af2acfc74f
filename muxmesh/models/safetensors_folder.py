"""Reads and writes weights in a Hugging Face style folder: safetensors, in one file or in shards.

Tensors are read as f32. Knows no model: the caller names each tensor and its shape.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from muxmesh.errors import ModelUnsupported
from muxmesh.models.file_fields import FileFields
from muxmesh.models.model_files import described, read_json_object
from muxmesh.models.safetensors_header import TensorEntry, read_header
from muxmesh.models.stored_dtypes import STORED_AS, from_bfloat16, in_dtype, is_finite
from muxmesh.quoting import named
from muxmesh.types import Dtype

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_INDEX_BYTES = 64 << 20
_DTYPES: dict[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PIECE_VALUES = 1 << 22
"""16 MiB as f32."""


def weight_files(folder: Path) -> list[Path]:
    """Paths of the weight files. Raises ModelUnsupported if one is missing or the folder has only other formats."""
    index = folder / _INDEX
    content = read_json_object(index, _MAX_INDEX_BYTES)
    names = [_SINGLE] if content is None else _shards(FileFields(index, content))
    missing = [name for name in names if not os.path.lexists(folder / name)]
    if missing:
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        hint = f"; {others[0]} is not supported, convert it to safetensors" if others else ""
        raise ModelUnsupported(f"{folder}: weights are missing: {named(', '.join(missing))}{hint}")
    return [folder / name for name in names]


def _shards(fields: FileFields) -> list[str]:
    weight_map = fields.inner("weight_map").values
    if not weight_map:
        raise fields.refuse("weight_map", "is missing or empty")
    for weight, name in weight_map.items():
        if not isinstance(name, str) or not name or Path(name).name != name or "\0" in name:
            raise fields.refuse(
                f"weight_map.{weight}",
                f"is {described(name)}; must be the name of a file beside it",
            )
    return sorted(set(weight_map.values()))


class FolderWeights:
    """The tensors of a folder by name, over all its files. The files stay mapped as long as the object lives."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: dict[str, TensorEntry] = {}
        self._mapped: dict[Path, memoryview] = {}
        self.files = tuple(weight_files(folder))
        for path in self.files:
            entries = read_header(path)
            for name in sorted(entries.keys() & self._entries.keys()):
                raise ModelUnsupported(f"{path}: weight {named(name)} is in {self._entries[name].path.name} as well")
            self._entries |= entries

    def dtypes(self) -> list[str]:
        """Dtypes of the tensors, as safetensors calls them, sorted."""
        return sorted({entry.dtype for entry in self._entries.values()})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def check_dtypes(self) -> None:
        """Raises ModelUnsupported for a tensor that `read` cannot read."""
        for name, entry in self._entries.items():
            if entry.dtype not in _DTYPES:
                raise ModelUnsupported(
                    f"{entry.path}: weight {named(name)} is {named(entry.dtype)}; supported: {', '.join(_DTYPES)}. "
                    "Convert it to one of them"
                )

    def read(self, name: str, *shape: int) -> np.ndarray:
        """Returns one tensor as f32, read-only if it is stored as f32.

        Raises ModelUnsupported if the tensor is missing, damaged, or of another shape or an unsupported dtype.
        """
        stored = self._stored(name, shape)
        self._check_finite(name, stored)
        return self._as_f32(name, stored).reshape(shape)

    def pieces(self, name: str, dtype: Dtype, *shape: int) -> Iterator[np.ndarray]:
        """Yields the values of one tensor in order, in vectors of bounded length, as `STORED_AS` stores ``dtype``.

        Raises as `read`, and for a value beyond float16.
        """
        stored = self._stored(name, shape)
        is_exact = _DTYPES[self._entries[name].dtype] == dtype
        for first in range(0, len(stored), _PIECE_VALUES):
            piece = stored[first : first + _PIECE_VALUES]
            self._check_finite(name, piece)
            yield piece if is_exact else in_dtype(self._as_f32(name, piece), dtype, name)

    def _stored(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The values of one tensor as a vector in the file's dtype."""
        if name not in self._entries:
            raise ModelUnsupported(f"{self._folder}: weight {name} is missing")
        entry = self._entries[name]
        if entry.dtype not in _DTYPES:
            self.check_dtypes()
        if entry.shape != shape:
            raise ModelUnsupported(
                f"{self._folder}: weight {name} has shape {entry.shape}, but config.json requires {shape}"
            )
        if entry.path not in self._mapped:
            self._mapped[entry.path] = _map(entry.path)
        return np.frombuffer(self._mapped[entry.path][entry.first : entry.last], dtype=_stored_as(entry.dtype))

    def _as_f32(self, name: str, stored: np.ndarray) -> np.ndarray:
        is_bfloat16 = self._entries[name].dtype == "BF16"
        return from_bfloat16(stored) if is_bfloat16 else stored.astype(np.float32, copy=False)

    def _check_finite(self, name: str, stored: np.ndarray) -> None:
        entry = self._entries[name]
        if not is_finite(stored, _DTYPES[entry.dtype]):
            raise ModelUnsupported(f"{entry.path}: weight {name} contains NaN or infinity; the file is damaged")


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], values: Iterable[np.ndarray]
) -> None:
    """Writes a safetensors file from ``values`` in the order of ``shapes``, one tensor at a time."""
    names = {_stored_as(name): name for name in _DTYPES}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        end = offset + int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (dtype, shape), array in zip(shapes.values(), values, strict=True):
            assert array.dtype == dtype and array.shape == shape, (
                "a tensor has the dtype and the shape that `shapes` gives"
            )
            file.write(np.ascontiguousarray(array).data)


def _stored_as(name: str) -> np.dtype[Any]:
    return STORED_AS[_DTYPES[name]]


def _map(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
