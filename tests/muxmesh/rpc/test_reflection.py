"""Both reflection services of a server, asked through raw calls as a tool that knows only their names does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from muxmesh.rpc.reflection import add_reflection
from muxmesh.v1 import inference_pb2

VERSIONS = ("v1", "v1alpha")
INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
REFLECTION = {version: f"grpc.reflection.{version}.ServerReflection" for version in VERSIONS}


@pytest.fixture
async def channel(tmp_path: Path) -> AsyncIterator[grpc.aio.Channel]:
    server, address = grpc.aio.server(), f"unix:{tmp_path / 's.sock'}"
    add_reflection([INFERENCE, HEALTH], server)
    server.add_insecure_port(address)
    await server.start()
    async with grpc.aio.insecure_channel(address) as opened:
        yield opened
    await server.stop(0)


async def answers(channel: grpc.aio.Channel, version: str, **query: Any) -> reflection_pb2.ServerReflectionResponse:
    """The messages of v1 have the encoding of those of v1alpha."""
    method: Any = channel.stream_stream(
        f"/{REFLECTION[version]}/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    (response,) = [one async for one in method(iter([reflection_pb2.ServerReflectionRequest(**query)]))]
    assert isinstance(response, reflection_pb2.ServerReflectionResponse)
    return response


def files_of(response: reflection_pb2.ServerReflectionResponse) -> dict[str, descriptor_pb2.FileDescriptorProto]:
    files = map(descriptor_pb2.FileDescriptorProto.FromString, response.file_descriptor_response.file_descriptor_proto)
    return {file.name: file for file in files}


@pytest.mark.parametrize("version", VERSIONS)
async def test_each_version_lists_all_services_and_describes_each_of_them(
    channel: grpc.aio.Channel, version: str
) -> None:
    listed = await answers(channel, version, list_services="")
    names = {service.name for service in listed.list_services_response.service}
    assert names == {INFERENCE, HEALTH, *REFLECTION.values()}
    for name in names:
        files = files_of(await answers(channel, version, file_containing_symbol=name))
        declared = {f"{file.package}.{service.name}" for file in files.values() for service in file.service}
        assert name in declared


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("symbol", [f"{INFERENCE}.Generate", "muxmesh.v1.GenerateRequest", "muxmesh.v1.ChatMessage"])
async def test_a_method_and_a_message_are_found_by_their_names(
    channel: grpc.aio.Channel, version: str, symbol: str
) -> None:
    files = files_of(await answers(channel, version, file_containing_symbol=symbol))
    assert files[inference_pb2.DESCRIPTOR.name].SerializeToString() == inference_pb2.DESCRIPTOR.serialized_pb


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("symbol", ["", "muxmesh.v1.Nothing", f"{INFERENCE}.Nothing", "\0", "x" * 10_000])
async def test_an_unknown_symbol_is_not_found(channel: grpc.aio.Channel, version: str, symbol: str) -> None:
    response = await answers(channel, version, file_containing_symbol=symbol)
    assert response.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


async def test_the_file_of_v1_names_only_messages_of_v1(channel: grpc.aio.Channel) -> None:
    files = files_of(await answers(channel, "v1", file_by_filename="grpc/reflection/v1/reflection.proto"))
    file = files["grpc/reflection/v1/reflection.proto"]
    assert file.package == "grpc.reflection.v1"
    (method,) = file.service[0].method
    types = {field.type_name for message in file.message_type for field in message.field if field.type_name}
    assert types and all(name.startswith(".grpc.reflection.v1.") for name in types)
    assert (method.input_type, method.output_type) == (
        ".grpc.reflection.v1.ServerReflectionRequest",
        ".grpc.reflection.v1.ServerReflectionResponse",
    )
    assert (method.client_streaming, method.server_streaming) == (True, True)


async def test_several_servers_of_one_process_share_the_descriptor_of_v1(channel: grpc.aio.Channel) -> None:
    add_reflection([INFERENCE], grpc.aio.server())
    assert files_of(await answers(channel, "v1", file_containing_symbol=REFLECTION["v1"]))
