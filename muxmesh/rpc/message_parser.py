"""Parses requests from raw bytes, so that the error for a malformed request names the field.

Knows the protobuf wire format and descriptors, no particular message.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from muxmesh.errors import InvalidRequest

M = TypeVar("M", bound=Message)

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10
_MAX_SEARCHED_BYTES = 1024 * 1024
"""Larger malformed messages are not searched for the invalid field: the search blocks the event loop."""


def parse(kind: type[M], raw: bytes) -> M:
    """Parses a message of type ``kind``.

    Raises InvalidRequest if ``raw`` is malformed. Its field is the path of the first string that is not UTF-8, else the
    name of the message type.
    """
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        if len(raw) <= _MAX_SEARCHED_BYTES:
            for field in _invalid_strings(cast(Descriptor, kind.DESCRIPTOR), memoryview(raw)):
                raise InvalidRequest(field, "is not valid UTF-8") from error
        raise InvalidRequest(kind.DESCRIPTOR.name, f"is malformed: {error}") from error


def _invalid_strings(descriptor: Descriptor, raw: memoryview) -> Iterator[str]:
    """Paths of the string fields that are not UTF-8."""
    counts: Counter[int] = Counter()
    for number, value in _length_delimited(raw):
        field = descriptor.fields_by_number.get(number)
        if field is None:
            continue
        name = f"{field.name}[{counts[number]}]" if field.is_repeated else field.name
        counts[number] += 1
        if field.type == FieldDescriptor.TYPE_STRING:
            try:
                bytes(value).decode()
            except UnicodeDecodeError:
                yield name
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            assert field.message_type is not None
            yield from (f"{name}.{inner}" for inner in _invalid_strings(field.message_type, value))


def _length_delimited(raw: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(field number, value) of each length-delimited field, up to the first malformed field."""
    offset = 0
    try:
        while offset < len(raw):
            tag, offset = _varint(raw, offset)
            kind = tag & 7
            if kind == _LENGTH:
                length, offset = _varint(raw, offset)
                if length > len(raw) - offset:
                    return
                yield tag >> 3, raw[offset : offset + length]
                offset += length
            elif kind == _VARINT:
                _, offset = _varint(raw, offset)
            elif kind in (_FIXED64, _FIXED32):
                offset += 8 if kind == _FIXED64 else 4
            else:
                return
    except (IndexError, ValueError):
        return


def _varint(raw: memoryview, offset: int) -> tuple[int, int]:
    """The integer at ``offset`` and the offset after it. Raises IndexError or ValueError if it is malformed."""
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        byte = raw[offset + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, offset + index + 1
    raise ValueError(f"a varint is longer than {_MAX_VARINT_BYTES} bytes")
