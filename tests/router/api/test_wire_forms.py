"""Forms in which other clients write the same request: the encodings that protobuf allows, and odd but legal values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from muxmesh.errors import InvalidRequest, ModelNotFound
from muxmesh.rpc.message_parser import parse
from muxmesh.rpc.status_codes import from_rpc_error
from muxmesh.v1 import inference_pb2, mesh_pb2
from router.api.generate_messages import request_from_message
from router.generation import GenerationRequest, TokensPrompt
from tests.router.api.test_field_paths import LEAVES, wrapped
from tests.router.api.test_inference_service import service
from tests.support.pipeline_parts import tokens_of, writes
from tests.support.protobuf_wire import varint

REQUEST = inference_pb2.GenerateRequest
_VARINT = 0


def request_of(*parts: bytes) -> GenerationRequest:
    return request_from_message(parse(REQUEST, b"".join(parts)))


def text_of(text: str) -> bytes:
    return REQUEST(text=text).SerializeToString()


@pytest.mark.parametrize("path", ["decoding.allowed_token_ids", "stopping.stop_token_ids"])
@pytest.mark.parametrize("ids", [[5], [300, 7, 70_000]])
def test_packed_and_unpacked_numbers_are_the_same_list(path: str, ids: list[int]) -> None:
    packed = wrapped(LEAVES[path], b"".join(map(varint, ids)))
    unpacked = b"".join(wrapped(LEAVES[path], varint(number), _VARINT) for number in ids)
    mixed = wrapped(LEAVES[path], varint(ids[0]), _VARINT) + wrapped(LEAVES[path], b"".join(map(varint, ids[1:])))
    for raw in (packed, unpacked, mixed):
        request = request_of(text_of("hi"), raw)
        found = request.sampling.allowed_token_ids if "allowed" in path else request.stopping.stop_token_ids
        assert list(found or ()) == ids


def test_an_unpacked_prompt_is_the_same_prompt() -> None:
    raw = b"".join(wrapped(LEAVES["token_ids.ids"], varint(number), _VARINT) for number in (5, 300))
    prompt = request_of(raw).prompt
    assert isinstance(prompt, TokensPrompt) and list(prompt.token_ids) == [5, 300]


def test_of_a_field_that_is_sent_twice_the_last_value_counts_and_messages_are_merged() -> None:
    first = REQUEST(text="a", model="m", sampling=inference_pb2.SamplingOptions(top_k=3, seed=1))
    second = REQUEST(text="b", sampling=inference_pb2.SamplingOptions(seed=2))
    request = request_of(first.SerializeToString(), second.SerializeToString())
    assert request == request_of(
        REQUEST(text="b", model="m", sampling=inference_pb2.SamplingOptions(top_k=3, seed=2)).SerializeToString()
    )


def test_of_a_map_key_that_is_sent_twice_the_last_value_counts() -> None:
    parts = [REQUEST(decoding=inference_pb2.DecodingOptions(logit_bias={5: bias})) for bias in (1.0, -2.0)]
    request = request_of(text_of("hi"), *(part.SerializeToString() for part in parts))
    assert request.sampling.logit_bias == ((5, -2.0),)


def test_the_largest_key_of_a_map_is_a_token_id() -> None:
    decoding = inference_pb2.DecodingOptions(logit_bias={(1 << 32) - 1: 1.0})
    request = request_of(text_of("hi"), REQUEST(decoding=decoding).SerializeToString())
    assert request.sampling.logit_bias == (((1 << 32) - 1, 1.0),)


def test_a_seed_beyond_the_type_arrives_as_a_negative_one() -> None:
    raw = wrapped(LEAVES["sampling.seed"], varint((1 << 64) - 1), _VARINT)
    assert request_of(text_of("hi"), raw).seed == -1, "which validation refuses"


async def test_nul_is_a_character_like_any_other(tmp_path: Path) -> None:
    message = REQUEST(text="a\0b", kv=inference_pb2.KvOptions(cache_salt="\0"))
    message.stopping.stop_strings.append("\0")
    async with service(tmp_path, writes("x\0y")) as setup:
        responses = await setup.stream(message)
        chat = inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(role="user", content="\0")])
        await setup.stream(REQUEST(chat=chat))
    assert "".join(response.outputs.text for response in responses) == "x"
    assert responses[-1].outputs.finish_info.stop_string == "\0"
    request = setup.parts.attempts.requests[0]
    assert request.prompt_token_ids == tokens_of("a\0b")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": "\0"}, ModelNotFound, r"model: '\x00' is not served; served: m"),
        ({"request_id": "a\0"}, InvalidRequest, "request_id: has U+0000 at index 1"),
        ({"chat": {"messages": [{"role": "\0"}]}}, InvalidRequest, r"chat.messages[0].role: is '\x00'; one of"),
    ],
)
async def test_nul_is_quoted_in_an_error(
    tmp_path: Path, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    prompt: dict[str, Any] = {} if "chat" in fields else {"text": "a"}
    async with service(tmp_path, writes("x")) as setup:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await setup.stream(REQUEST(**prompt, **fields))
    received = from_rpc_error(caught.value)
    assert type(received) is error and str(received).startswith(message)


@pytest.mark.parametrize(
    ("metadata", "used"),
    [
        ((("x-request-id", "a-b"),), "a-b"),
        ((("X-Request-Id".lower(), "first"), ("x-request-id", "second")), "first"),
        ((("x-request-id", ""),), None),
        ((("x-request-id-bin", b"\xff\x00"),), None),
    ],
    ids=["plain", "twice", "empty", "binary"],
)
async def test_a_request_id_in_the_metadata_is_used_if_it_is_text(
    tmp_path: Path, metadata: tuple[tuple[str, str | bytes], ...], used: str | None
) -> None:
    async with service(tmp_path, writes("x")) as setup:
        call = setup.stub.GenerateStream(REQUEST(text="a"), metadata=metadata)
        initial: Any = await call.initial_metadata()
        _ = [response async for response in call]
    request_id = dict(initial)["x-request-id"]
    assert request_id == setup.parts.attempts.requests[0].request_id
    assert request_id == used if used else len(request_id) == 16


MAY_EXCEED_A_DOUBLE = {"SamplingOptions.seed", "PromptInfo.seed"}
"""64-bit integers that are what a client has chosen. The mesh draws seeds below 2^53."""
BYTES_OR_COUNTS = ("_bytes", "bytes_per_token", "bytes_written", "_tokens", "_hit", "_queried", "decision", "num_")
"""Parts of the names of the others: fewer than 2^53 of them fit in any memory or any time."""


def test_every_number_that_a_double_cannot_hold_is_a_seed_that_the_client_chose() -> None:
    """JavaScript, and jq, read numbers as doubles."""
    messages = [*inference_pb2.DESCRIPTOR.message_types_by_name.values()]
    messages += [*mesh_pb2.DESCRIPTOR.message_types_by_name.values()]
    wide = {
        f"{message.name}.{field.name}"
        for message in messages
        for field in message.fields
        if field.type in (field.TYPE_INT64, field.TYPE_UINT64, field.TYPE_FIXED64, field.TYPE_SINT64)
    }
    assert wide >= MAY_EXCEED_A_DOUBLE
    others = {name for name in wide - MAY_EXCEED_A_DOUBLE if not any(part in name for part in BYTES_OR_COUNTS)}
    assert others == set()
