"""Reads and writes weights in a Hugging Face style folder: safetensors, in one file or in shards.

Tensors are read as f32. Knows no model: the caller names each tensor and its shape.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from muxmesh.errors import ModelUnsupported

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def weight_files(folder: Path) -> list[Path]:
    """Paths of the weight files. Raises ModelUnsupported if one is missing or the folder has only other formats."""
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelUnsupported(f"{index}: has no valid weight_map; the index is damaged") from error
    else:
        names = [_SINGLE]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        hint = f"; {others[0]} is not supported, convert it to safetensors" if others else ""
        raise ModelUnsupported(f"{folder}: weights are missing: {', '.join(missing)}{hint}")
    return [folder / name for name in names]


class FolderWeights:
    """The tensors of a folder by name, over all its files. The files stay mapped as long as the object lives."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: dict[str, tuple[Path, dict[str, Any], memoryview]] = {}
        self._read: set[str] = set()
        for path in weight_files(folder):
            header, data = _map(path)
            self._entries |= {name: (path, entry, data) for name, entry in header.items() if name != "__metadata__"}

    def dtypes(self) -> list[str]:
        """Dtypes of the tensors, as safetensors calls them, sorted."""
        return sorted({str(entry["dtype"]) for _, entry, _ in self._entries.values()})

    def require_all_read(self, may_be_unread: Callable[[str], bool]) -> None:
        """Raises ModelUnsupported if a tensor was not read, because ignoring a weight would change the output."""
        unread = sorted(name for name in self._entries.keys() - self._read if not may_be_unread(name))
        if unread:
            raise ModelUnsupported(
                f"{self._folder}: {len(unread)} weights are not part of a supported model: {unread[0]}, ..."
            )

    def read(self, name: str, *shape: int) -> np.ndarray:
        """Returns one tensor as f32, read-only if it is stored as f32.

        Raises ModelUnsupported if the tensor is missing, damaged, or of another shape or an unsupported dtype.
        """
        if name not in self._entries:
            raise ModelUnsupported(f"{self._folder}: weight {name} is missing")
        self._read.add(name)
        path, entry, data = self._entries[name]
        if entry["dtype"] not in _DTYPES:
            raise ModelUnsupported(
                f"{path}: weight {name} is {entry['dtype']}; supported: {', '.join(_DTYPES)}. Convert it to one of them"
            )
        if tuple(entry["shape"]) != shape:
            raise ModelUnsupported(
                f"{self._folder}: weight {name} has shape {tuple(entry['shape'])}, but config.json requires {shape}"
            )
        first, last = entry["data_offsets"]
        if last > len(data) or last - first != int(np.prod(shape)) * _DTYPES[entry["dtype"]].itemsize:
            raise ModelUnsupported(f"{path}: weight {name} is truncated; the file is damaged")
        values = np.frombuffer(data[first:last], dtype=_DTYPES[entry["dtype"]])
        if entry["dtype"] == "BF16":  # a BF16 is the upper half of an f32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        result: np.ndarray = values.astype(np.float32, copy=False).reshape(shape)
        if not np.isfinite(result).all():
            raise ModelUnsupported(f"{path}: weight {name} contains NaN or infinity; the file is damaged")
        return result


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], values: Iterable[np.ndarray]
) -> None:
    """Writes a safetensors file from ``values`` in the order of ``shapes``, one tensor at a time."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
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


def _map(path: Path) -> tuple[dict[str, Any], memoryview]:
    """Maps a safetensors file; returns its header and its data.

    The format is an 8-byte little-endian header length, the header as JSON, then the data
    (https://huggingface.co/docs/safetensors).
    """
    try:
        with path.open("rb") as file:
            whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        header_bytes = int.from_bytes(whole[:8], "little")
        header: dict[str, Any] = json.loads(bytes(whole[8 : 8 + header_bytes]))
        complete = all(
            {"dtype", "shape", "data_offsets"} <= entry.keys()
            for name, entry in header.items()
            if name != "__metadata__"
        )
        if not complete:
            raise ValueError("an entry of the header lacks dtype, shape or data_offsets")
    except (ValueError, AttributeError) as error:
        raise ModelUnsupported(f"{path}: not a safetensors file, or damaged") from error
    return header, whole[8 + header_bytes :]
