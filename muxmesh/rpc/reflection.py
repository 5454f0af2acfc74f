"""Server reflection: the descriptors of a server's services, under the names v1 and v1alpha.

`grpc_reflection` has v1alpha only; current tools ask for v1 first. The two protocols differ in the name of their
package alone, so one servicer serves both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_reflection.v1alpha import reflection, reflection_pb2

_ALPHA, _V1 = "grpc.reflection.v1alpha", "grpc.reflection.v1"
_SERVICE, _METHOD = "ServerReflection", "ServerReflectionInfo"
_FILE = "grpc/reflection/v1/reflection.proto"


def add_reflection(service_names: Iterable[str], server: grpc.aio.Server) -> None:
    """Adds both reflection services to ``server``. They list ``service_names`` and themselves."""
    pool = descriptor_pool.Default()
    _add_v1_descriptor(pool)
    names = [f"{package}.{_SERVICE}" for package in (_V1, _ALPHA)]
    servicer = reflection.aio.ReflectionServicer([*service_names, *names], pool=_PoolWithMethods(pool))
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = [grpc.method_handlers_generic_handler(name, {_METHOD: handler}) for name in names]
    server.add_generic_rpc_handlers(tuple(handlers))


class _PoolWithMethods:
    """A descriptor pool that finds methods by their names too, as the protocol of reflection requires."""

    def __init__(self, pool: descriptor_pool.DescriptorPool) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:
        """Raises KeyError for an unknown symbol."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            service, _, method = symbol.rpartition(".")
            descriptor = self._pool.FindServiceByName(service)
            if method not in descriptor.methods_by_name:
                raise
            return descriptor.file


def _add_v1_descriptor(pool: descriptor_pool.DescriptorPool) -> None:
    """Adds the descriptor of v1 to ``pool``, so that tools can describe the service that they call."""
    try:
        pool.FindFileByName(_FILE)
    except KeyError:
        alpha = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
        pool.AddSerializedFile(_renamed(alpha).SerializeToString())


def _renamed(alpha: descriptor_pb2.FileDescriptorProto) -> descriptor_pb2.FileDescriptorProto:
    """The file of v1alpha as that of v1."""
    file = descriptor_pb2.FileDescriptorProto()
    file.CopyFrom(alpha)
    file.name, file.package = _FILE, _V1
    for message in file.message_type:
        for field in filter(lambda field: field.type_name, message.field):
            field.type_name = field.type_name.replace(f".{_ALPHA}.", f".{_V1}.")
    for service in file.service:
        for method in service.method:
            method.input_type = method.input_type.replace(f".{_ALPHA}.", f".{_V1}.")
            method.output_type = method.output_type.replace(f".{_ALPHA}.", f".{_V1}.")
    return file
