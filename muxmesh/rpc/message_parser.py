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

_VARINT, _FIXED64, _LENGTH, _START_GROUP, _END_GROUP, _FIXED32 = range(6)
_GROUP = 0
_MAX_VARINT_BYTES = 10
_MIN_FIELD_BYTES = 2
MAX_FIELDS = 16_384
"""Most fields of a client's request. Messages too short to hold so many are not searched."""
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


def check_num_fields(kind: type[Message], raw: bytes) -> None:
    """Raises InvalidRequest if a message of type ``kind`` has more than `MAX_FIELDS` fields, before it is parsed.

    Nested fields count, elements of a packed field do not. The error names the field at which the limit is exceeded.
    """
    if len(raw) > _MIN_FIELD_BYTES * MAX_FIELDS:
        for count, path in enumerate(_known_paths(cast(Descriptor, kind.DESCRIPTOR), memoryview(raw), "")):
            if count >= MAX_FIELDS:
                raise InvalidRequest(path, f"is repeated too often: a message has at most {MAX_FIELDS} fields")


def _known_paths(descriptor: Descriptor, raw: memoryview, prefix: str) -> Iterator[str]:
    """The path of each field, unknown ones included, in the order of the wire."""
    for number, value in _fields(raw):
        field = descriptor.fields_by_number.get(number)
        yield f"{prefix}{field.name if field else f'(number {number})'}"
        if value is not None and field is not None and (inner := _message_type(field)) is not None:
            yield from _known_paths(inner, value, f"{prefix}{field.name}.")


def _message_type(field: FieldDescriptor) -> Descriptor | None:
    return field.message_type if field.type == FieldDescriptor.TYPE_MESSAGE else None


def _invalid_strings(descriptor: Descriptor, raw: memoryview) -> Iterator[str]:
    """Paths of the string fields that are not UTF-8, up to the first group."""
    counts: Counter[int] = Counter()
    for number, value in _fields(raw):
        if number == _GROUP:
            return
        field = descriptor.fields_by_number.get(number)
        if field is None or value is None:
            continue
        name = f"{field.name}[{counts[number]}]" if field.is_repeated else field.name
        counts[number] += 1
        if field.type == FieldDescriptor.TYPE_STRING:
            try:
                bytes(value).decode()
            except UnicodeDecodeError:
                yield name
        elif (inner := _message_type(field)) is not None:
            yield from (f"{name}.{path}" for path in _invalid_strings(inner, value))


def _fields(raw: memoryview) -> Iterator[tuple[int, memoryview | None]]:
    """(number, value if it is length-delimited) of each field, up to the first malformed one.

    The tags that begin and end a group have the number `_GROUP`; its fields follow like others.
    """
    offset = 0
    try:
        while offset < len(raw):
            tag, offset = _varint(raw, offset)
            kind, value = tag & 7, None
            if kind == _LENGTH:
                length, offset = _varint(raw, offset)
                if length > len(raw) - offset:
                    return
                value = raw[offset : offset + length]
                offset += length
            elif kind == _VARINT:
                _, offset = _varint(raw, offset)
            elif kind in (_FIXED64, _FIXED32):
                offset += 8 if kind == _FIXED64 else 4
            elif kind not in (_START_GROUP, _END_GROUP):
                return
            yield _GROUP if kind in (_START_GROUP, _END_GROUP) else tag >> 3, value
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
