"""Parses requests from raw bytes, so that a damaged one is refused by the name of its field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from muxmesh.errors import InvalidRequest

M = TypeVar("M", bound=Message)

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def parse(kind: type[M], raw: bytes) -> M:
    """The message in ``raw``. Raises InvalidRequest with the path of a string that is not UTF-8."""
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        field = next(_bad_strings(cast(Descriptor, kind.DESCRIPTOR), memoryview(raw)), None)
        if field is not None:
            raise InvalidRequest(field, "is not valid UTF-8") from error
        raise InvalidRequest(kind.DESCRIPTOR.name, f"is no message of this type: {error}") from error


def _bad_strings(descriptor: Descriptor, raw: memoryview) -> Iterator[str]:
    """Paths of string fields whose bytes are not UTF-8."""
    for number, value in _length_delimited(raw):
        field = descriptor.fields_by_number.get(number)
        if field is None:
            continue
        if field.type == FieldDescriptor.TYPE_STRING:
            try:
                bytes(value).decode()
            except UnicodeDecodeError:
                yield field.name
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            assert field.message_type is not None
            yield from (f"{field.name}.{inner}" for inner in _bad_strings(field.message_type, value))


def _length_delimited(raw: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(field number, value) of each length-delimited field; stops where the bytes make no sense."""
    at = 0
    try:
        while at < len(raw):
            tag, at = _varint(raw, at)
            kind = tag & 7
            if kind == _LENGTH:
                length, at = _varint(raw, at)
                yield tag >> 3, raw[at : at + length]
                at += length
            elif kind == _VARINT:
                _, at = _varint(raw, at)
            elif kind in (_FIXED64, _FIXED32):
                at += 8 if kind == _FIXED64 else 4
            else:
                return
    except IndexError:
        return


def _varint(raw: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
