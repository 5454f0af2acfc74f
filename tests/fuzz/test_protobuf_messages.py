"""Arbitrary bytes, and requests with arbitrary changes, as messages of every method of the Inference service."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.v1 import inference_pb2
from tests.support.fuzzed_router import FuzzedRouter, fuzzed_router
from tests.support.fuzzing import fuzz
from tests.support.protobuf_wire import delimited, varint

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
METHODS = [f"/{SERVICE.full_name}/{method.name}" for method in SERVICE.methods]
REFUSALS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
REQUEST = inference_pb2.GenerateRequest(
    request_id="r",
    model="m",
    text="Hello, wörld",
    temperature=0.5,
    sampling=inference_pb2.SamplingOptions(num_sequences=2, top_k=5, top_p=0.5, min_p=0.1, seed=7),
    decoding=inference_pb2.DecodingOptions(presence_penalty=1, logit_bias={7: 1.5}, allowed_token_ids=[4, 5]),
    stopping=inference_pb2.StoppingOptions(max_new_tokens=4, stop_token_ids=[9], stop_strings=["end", "ö"]),
    response=inference_pb2.ResponseOptions(output_token_ids=True, prompt_token_ids=True, scheduling=True),
    kv=inference_pb2.KvOptions(cache_salt="salt", bypass_prefix_cache=True),
    truncate_prompt_tokens=3,
    priority=-2,
    expected_output_tokens=4,
)
CHAT = inference_pb2.GenerateRequest(
    model="m", chat=inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(role="user", content="hi")])
)
TOKENS = inference_pb2.GenerateRequest(model="m", token_ids=inference_pb2.TokenIds(ids=[3, 4, 258]))
TOKENIZE = inference_pb2.TokenizeRequest(model="m", text="wörld", add_special_tokens=True, token_texts=True)
DETOKENIZE = inference_pb2.DetokenizeRequest(model="m", token_ids=[3, 4, 258], skip_special_tokens=True)
VALID = [message.SerializeToString() for message in (REQUEST, CHAT, TOKENS, TOKENIZE, DETOKENIZE)]

numbers = st.sampled_from([*range(20), 100, 101, 102, 536_870_911])
varints = st.integers(0, (1 << 64) - 1).map(varint) | st.sampled_from([b"\x80" * 9 + b"\x01", b"\x80" * 20, b"\x80"])
fields = st.recursive(
    st.builds(lambda number, value: varint(number << 3) + value, numbers, varints)
    | st.builds(lambda number, value: varint(number << 3 | 5) + value, numbers, st.binary(min_size=4, max_size=4))
    | st.builds(lambda number, value: varint(number << 3 | 1) + value, numbers, st.binary(min_size=8, max_size=8))
    | st.builds(delimited, numbers, st.binary(max_size=40) | st.text(max_size=20).map(str.encode))
    | st.builds(lambda number, kind: varint(number << 3 | kind), numbers, st.sampled_from([3, 4, 6, 7])),
    lambda inner: st.builds(delimited, numbers, st.lists(inner, max_size=6).map(b"".join)),
    max_leaves=10,
)
repeated = st.builds(lambda field, times: field * times, fields, st.sampled_from([2, 100, 20_000]))
messages = st.lists(fields, max_size=5).map(b"".join) | repeated


@st.composite
def changed(draw: st.DrawFn) -> bytes:
    """A valid request of which a part is replaced, repeated or left out."""
    raw = draw(st.sampled_from(VALID))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(raw)))
        end = draw(st.integers(start, min(len(raw), start + 12)))
        instead = draw(st.binary(max_size=6) | st.just(raw[start:end] * 2) | fields)
        raw = raw[:start] + instead + raw[end:]
    return raw


@pytest.fixture(scope="module")
def router() -> Iterator[FuzzedRouter]:
    with fuzzed_router() as router:
        yield router
        router.check_tasks()


@fuzz(quick=300, part=0.3)
@given(method=st.sampled_from(METHODS), raw=st.binary(max_size=200) | messages | changed())
def test_any_message_is_answered_or_refused_by_its_own_fault(router: FuzzedRouter, method: str, raw: bytes) -> None:
    assert router.call(method, raw) in REFUSALS
    router.check()


@fuzz(quick=50, part=0.0)
@given(raw=messages | changed())
def test_a_client_that_behaves_well_is_served_in_between(router: FuzzedRouter, raw: bytes) -> None:
    router.call(METHODS[0], raw)
    router.generate()
