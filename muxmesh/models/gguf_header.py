"""Checks that a GGUF file is well-formed before a library reads it. Keeps no value and knows no architecture.

`gguf.GGUFReader` takes every count, length and offset on trust: with a lying one it fills the memory or computes for
ever. This check walks over the same bytes once, bounded by the size of the file.
(Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from muxmesh.errors import ModelUnsupported
from muxmesh.models.model_files import readable
from muxmesh.quoting import named

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT_KEY = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
_MAX_FIELDS = 1 << 16
_MAX_TENSORS = 1 << 16
_MAX_NAME_BYTES = 1 << 16
_MAX_ELEMENTS = 1 << 21
"""Of one array: several times the merges of the largest vocabularies. The reader keeps an object for each element."""
_MAX_DIMS = 4
_SCALAR_BYTES = {
    GGUFValueType.UINT8: 1, GGUFValueType.INT8: 1, GGUFValueType.BOOL: 1, GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2, GGUFValueType.UINT32: 4, GGUFValueType.INT32: 4, GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8, GGUFValueType.INT64: 8, GGUFValueType.FLOAT64: 8,
}  # fmt: skip


def check_gguf_header(path: Path) -> None:
    """Raises ModelUnsupported, which names the file and the field or tensor, for a file that is not well-formed."""
    with readable(path):
        if path.stat().st_size == 0:
            raise ModelUnsupported(f"{path}: not a GGUF file, or damaged: is empty")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _Walk(path, content).check()


class _Walk:
    """A position in a file that moves over its header."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path = path
        self._content = content
        self._size = len(content)
        self._at = 0
        self._alignment = _DEFAULT_ALIGNMENT

    def check(self) -> None:
        if self._bytes(4, "the magic number") != _MAGIC:
            raise self._damaged("does not begin with GGUF")
        version = self._number(4, "the version")
        if version not in _VERSIONS:
            hint = "; it is in big-endian byte order" if version & 0xFFFF == 0 else ""
            raise self._damaged(f"has version {version}; supported: 2 and 3{hint}")
        num_tensors, num_fields = self._number(8, "the number of tensors"), self._number(8, "the number of fields")
        if num_tensors > _MAX_TENSORS or num_fields > _MAX_FIELDS:
            raise self._damaged(f"claims {num_tensors} tensors and {num_fields} fields; at most {_MAX_TENSORS} each")
        names: set[str] = set()
        for index in range(num_fields):
            name = self._text(f"the name of field {index}")
            self._add(names, name, "field")
            self._skip_field(name)
        names.clear()
        spans = [self._tensor(index, names) for index in range(num_tensors)]
        start = -(-self._at // self._alignment) * self._alignment
        for name, offset, num_bytes in spans:
            if start + offset + num_bytes > self._size:
                raise self._damaged(
                    f"tensor {named(name)}: ends at byte {start + offset + num_bytes} of {self._size}; it is truncated"
                )
            if offset % self._alignment:
                raise self._damaged(f"tensor {named(name)}: offset {offset} is not a multiple of {self._alignment}")

    def _add(self, names: set[str], name: str, kind: str) -> None:
        if name in names:
            raise self._damaged(f"{kind} {named(name)}: is there twice")
        names.add(name)

    def _skip_field(self, name: str) -> None:
        label = f"field {named(name)}"
        kind = self._value_type(label)
        if name == _ALIGNMENT_KEY:
            self._alignment = self._number(4, label) if kind is GGUFValueType.UINT32 else 0
            if self._alignment & (self._alignment - 1) or not 0 < self._alignment <= _MAX_ALIGNMENT:
                raise self._damaged(f"{label}: must be a power of two up to {_MAX_ALIGNMENT}")
        elif kind is GGUFValueType.STRING:
            self._text(label)
        elif kind is GGUFValueType.ARRAY:
            self._skip_array(label)
        else:
            self._bytes(_SCALAR_BYTES[kind], label)

    def _skip_array(self, label: str) -> None:
        kind, count = self._value_type(label), self._number(8, label)
        if kind is GGUFValueType.ARRAY:
            raise self._damaged(f"{label}: is an array of arrays, which is not supported")
        if count > _MAX_ELEMENTS:
            raise self._damaged(f"{label}: has {count} elements; at most {_MAX_ELEMENTS}")
        if kind is GGUFValueType.STRING:
            for _ in range(count):
                self._text(label)
        else:
            self._bytes(count * _SCALAR_BYTES[kind], label)

    def _tensor(self, index: int, names: set[str]) -> tuple[str, int, int]:
        """Name, offset and length in bytes of a tensor."""
        name = self._text(f"the name of tensor {index}", _MAX_NAME_BYTES)
        self._add(names, name, "tensor")
        label = f"tensor {named(name)}"
        num_dims = self._number(4, label)
        if not 0 < num_dims <= _MAX_DIMS:
            raise self._damaged(f"{label}: has {num_dims} dimensions; from 1 to {_MAX_DIMS} are needed")
        sizes = [self._number(8, label) for _ in range(num_dims)]
        if 0 in sizes or math.prod(sizes) > 8 * self._size:
            raise self._damaged(f"{label}: has the shape {sizes}, which does not fit into the file")
        number, offset = self._number(4, label), self._number(8, label)
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
        except (ValueError, KeyError) as error:
            raise self._damaged(f"{label}: has the unknown type {number}") from error
        if sizes[0] % block:
            raise self._damaged(f"{label}: has rows of {sizes[0]} values; its type needs a multiple of {block}")
        return name, offset, math.prod(sizes) // block * block_bytes

    def _value_type(self, label: str) -> GGUFValueType:
        number = self._number(4, label)
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise self._damaged(f"{label}: has the unknown type {number}") from error

    def _text(self, label: str, max_bytes: int | None = None) -> str:
        length = self._number(8, label)
        if max_bytes is not None and length > max_bytes:
            raise self._damaged(f"{label}: is {length} bytes long; at most {max_bytes}")
        try:
            return self._bytes(length, label).decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"{label}: is not UTF-8") from error

    def _number(self, num_bytes: int, label: str) -> int:
        return int.from_bytes(self._bytes(num_bytes, label), "little")

    def _bytes(self, count: int, label: str) -> bytes:
        if count > self._size - self._at:
            raise self._damaged(f"{label}: needs {count} bytes at {self._at} of {self._size}; the file is truncated")
        self._at += count
        return self._content[self._at - count : self._at]

    def _damaged(self, problem: str) -> ModelUnsupported:
        return ModelUnsupported(f"{self._path}: not a GGUF file, or damaged: {problem}")
