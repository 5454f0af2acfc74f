from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from muxmesh.errors import ModelUnsupported
from muxmesh.models.gguf_header import check_gguf_header
from tests.support.gguf_files import TinyGguf, write_gguf

U8, U32, I32, F32, BOOL, TEXT, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def field(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(name: bytes = b"t", sizes: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def file_of(*parts: bytes, tensors: int = 0, fields: int = 0, version: int = 3, data: bytes = b"\0" * 64) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + b"".join(parts)
    return head + b"\0" * (-len(head) % 32) + data


LIE = 1 << 60
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "another magic number": (b"GGML" + b"\0" * 40, "does not begin with GGUF"),
    "text": (b"not a gguf file at all", "does not begin with GGUF"),
    "only the magic number": (b"GGUF", "the version: needs 4 bytes at 4 of 4; the file is truncated"),
    "version 1": (file_of(version=1), "has version 1; supported: 2 and 3"),
    "big-endian": (file_of(version=3 << 24), "it is in big-endian byte order"),
    "many fields": (file_of(fields=LIE), "fields; at most 65536 each"),
    "many tensors": (file_of(tensors=LIE), "tensors and 0 fields; at most 65536 each"),
    "more fields than there are": (file_of(fields=9, data=b""), "the file is truncated"),
    "a long name": (file_of(text(b"a", LIE), fields=1), "the name of field 0: needs 1152921504606846976 bytes"),
    "a long text": (file_of(field(b"a", TEXT, text(b"x", LIE)), fields=1), "field a: needs 1152921504606846976 bytes"),
    "a text that is no UTF-8": (file_of(field(b"a", TEXT, text(b"\xff")), fields=1), "field a: is not UTF-8"),
    "a name that is no UTF-8": (file_of(field(b"\xff", U8, b"\0"), fields=1), "the name of field 0: is not UTF-8"),
    "an unknown type": (file_of(field(b"a", 99, b""), fields=1), "field a: has the unknown type 99"),
    "an array of an unknown type": (file_of(field(b"a", ARRAY, array(77, 1, b"")), fields=1), "unknown type 77"),
    "a long array": (file_of(field(b"a", ARRAY, array(U8, LIE, b"")), fields=1), "elements; at most 2097152"),
    "a long array of texts": (file_of(field(b"a", ARRAY, array(TEXT, LIE, b"")), fields=1), "elements; at most"),
    "an array beyond the end": (file_of(field(b"a", ARRAY, array(U64, 1 << 20, b"")), fields=1), "field a: needs 8388"),
    "an array of arrays": (file_of(field(b"a", ARRAY, array(ARRAY, 1, b"")), fields=1), "is an array of arrays"),
    "a field twice": (file_of(*[field(b"a", U8, b"\0")] * 2, fields=2), "field a: is there twice"),
    "an alignment of 0": (file_of(field(b"general.alignment", U32, b"\0" * 4), fields=1), "must be a power of two"),
    "an alignment of 3": (file_of(field(b"general.alignment", U32, b"\3\0\0\0"), fields=1), "must be a power of two"),
    "an alignment that is a text": (file_of(field(b"general.alignment", TEXT, text(b"")), fields=1), "a power of two"),
    "no dimensions": (file_of(tensor(sizes=()), tensors=1), "tensor t: has 0 dimensions; from 1 to 4 are needed"),
    "many dimensions": (file_of(tensor(sizes=(1,) * 5), tensors=1), "tensor t: has 5 dimensions"),
    "a dimension of 0": (file_of(tensor(sizes=(8, 0)), tensors=1), "tensor t: has the shape [8, 0]"),
    "huge dimensions": (file_of(tensor(sizes=(LIE,) * 4), tensors=1), "which does not fit into the file"),
    "an unknown quantization": (file_of(tensor(kind=999), tensors=1), "tensor t: has the unknown type 999"),
    "a removed quantization": (file_of(tensor(kind=4), tensors=1), "tensor t: has the unknown type 4"),
    "a row of half a block": (file_of(tensor(sizes=(8,), kind=8), tensors=1), "its type needs a multiple of 32"),
    "an offset beyond the end": (file_of(tensor(offset=1 << 50), tensors=1), "it is truncated"),
    "the largest offset": (file_of(tensor(offset=(1 << 64) - 32), tensors=1), "it is truncated"),
    "an offset between": (file_of(tensor(offset=4), tensors=1), "offset 4 is not a multiple of 32"),
    "a tensor twice": (file_of(tensor(), tensor(), tensors=2), "tensor t: is there twice"),
    "truncated data": (file_of(tensor(sizes=(17,)), tensors=1), "it is truncated"),
    "a name with line ends": (file_of(tensor(b"a\nb", ()), tensors=1), r"tensor a\nb: has 0"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_header_is_one_line_and_takes_no_memory(tmp_path: Path, damage: str) -> None:
    content, problem = DAMAGED[damage]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ModelUnsupported) as caught:
        check_gguf_header(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}: not a GGUF file, or damaged: ")
    assert problem in str(caught.value) and "\n" not in str(caught.value)
    assert peak_bytes < 1 << 20


@pytest.mark.parametrize(
    "tiny", [TinyGguf(), TinyGguf(architecture="qwen3"), TinyGguf(more=lambda writer: writer.add_custom_alignment(64))]
)
def test_a_file_of_the_gguf_package_passes(tmp_path: Path, tiny: TinyGguf) -> None:
    write_gguf(tmp_path / "m.gguf", tiny)
    check_gguf_header(tmp_path / "m.gguf")


@pytest.mark.parametrize("parts", [[], [field(b"a", BOOL, b"\1"), field(b"b", ARRAY, array(F32, 2, b"\0" * 8))]])
def test_any_well_formed_file_passes(tmp_path: Path, parts: list[Any]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(file_of(*parts, tensor(sizes=(4, 4)), fields=len(parts), tensors=1))
    check_gguf_header(path)


def test_every_shorter_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    whole = file_of(
        field(b"a", TEXT, text(b"abc")), field(b"b", I32, b"\0" * 4), tensor(sizes=(16,)), fields=2, tensors=1
    )
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelUnsupported, match=r"m\.gguf: not a GGUF file, or damaged"):
            check_gguf_header(path)
