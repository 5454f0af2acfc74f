"""Finds the fields of a message that this mesh does not know, and names them. Knows no particular message.

Fields of vLLM that the mesh does not support are reserved in the proto: the numbers and the names of a message's
reserved fields are listed there in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, cast

from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from muxmesh.errors import InvalidRequest


def refuse_unknown_fields(message: Message) -> None:
    """Raises InvalidRequest for the first field, at any depth, that the descriptor of ``message`` does not have."""
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    if known.ByteSize() == message.ByteSize():
        return  # nearly always, and found out without a walk in Python
    for path, problem in _unknown_fields(message, ""):
        raise InvalidRequest(path, problem)


@functools.cache
def reserved_fields(descriptor: Descriptor) -> dict[int, str]:
    """Number → name of the reserved fields of a message."""
    proto = DescriptorProto()
    descriptor.CopyToProto(proto)
    numbers = [number for one in proto.reserved_range for number in range(one.start, one.end)]
    return dict(zip(numbers, proto.reserved_name, strict=True))


def _unknown_fields(message: Message, path: str) -> Iterator[tuple[str, str]]:
    """Path and problem of each unknown field."""
    unknown_fields: Any = UnknownFieldSet(message)
    for unknown in unknown_fields:
        name, problem = _explained(cast(Descriptor, message.DESCRIPTOR), unknown.field_number)
        yield path + name, problem
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        if not field.is_repeated:
            yield from _unknown_fields(value, f"{path}{field.name}.")
            continue
        for index, inner in enumerate(value):
            yield from _unknown_fields(inner, f"{path}{field.name}[{index}].")


def _explained(descriptor: Descriptor, number: int) -> tuple[str, str]:
    """Name and problem of an unknown field. A known number is unknown if its wire type is not that of the field."""
    if (field := descriptor.fields_by_number.get(number)) is not None:
        kind = FieldDescriptorProto.Type.Name(FieldDescriptorProto.Type.ValueType(field.type))
        kind = field.message_type.name if field.message_type else kind.removeprefix("TYPE_").lower()
        return field.name, f"is sent with another wire type than that of {kind}"
    if (name := reserved_fields(descriptor).get(number)) is not None:
        return name, f"(field {number}) is not supported by this mesh; leave it out"
    return f"(number {number})", "is a field that this mesh does not know; it may be of a newer version"
