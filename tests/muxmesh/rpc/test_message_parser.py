import contextlib

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.errors import InvalidRequest
from muxmesh.internal.v1 import kvstore_pb2
from muxmesh.rpc.message_parser import MAX_FIELDS, check_num_fields, parse
from muxmesh.v1 import inference_pb2
from tests.support.protobuf_wire import delimited, varint

MIB = 1024 * 1024
BAD = "\N{LATIN SMALL LETTER E WITH ACUTE}".encode()[:1]
"""The first byte of a two-byte character."""


def refused(raw: bytes, kind: type[Message] = inference_pb2.GenerateRequest) -> tuple[str, str]:
    """Field and problem of the error."""
    with pytest.raises(InvalidRequest) as caught:
        parse(kind, raw)
    return caught.value.field, caught.value.problem


VALID = inference_pb2.GenerateRequest(
    request_id="r",
    model="é",
    text="héllo",
    temperature=0.5,
    sampling=inference_pb2.SamplingOptions(seed=1 << 62),
    decoding=inference_pb2.DecodingOptions(logit_bias={7: -1.5}),
    stopping=inference_pb2.StoppingOptions(stop_strings=["ä", "ö"]),
    priority=-4,
    chat=inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(role="user", content="ü")]),
)


def test_a_valid_message_is_parsed() -> None:
    assert parse(inference_pb2.GenerateRequest, VALID.SerializeToString()) == VALID
    assert parse(inference_pb2.GenerateRequest, b"") == inference_pb2.GenerateRequest()


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (delimited(1, BAD), "request_id"),
        (delimited(3, BAD), "text"),
        (delimited(8, delimited(4, b"ok") + delimited(4, BAD)), "stopping.stop_strings[1]"),
        (delimited(10, delimited(2, BAD)), "kv.cache_salt"),
        (delimited(100, delimited(1, delimited(1, BAD))), "chat.messages[0].role"),
        (
            delimited(100, delimited(1, delimited(1, b"user")) + delimited(1, delimited(2, BAD))),
            "chat.messages[1].content",
        ),
    ],
)
def test_a_string_that_is_not_utf_8_is_named_by_its_path(raw: bytes, field: str) -> None:
    assert refused(raw) == (field, "is not valid UTF-8")


def test_the_first_of_several_invalid_strings_is_named() -> None:
    assert refused(delimited(2, BAD) + delimited(1, BAD))[0] == "model"


@pytest.mark.parametrize("field", ["varint", "fixed 32", "fixed 64", "length-delimited", "unknown"])
def test_fields_of_every_wire_type_are_skipped(field: str) -> None:
    before = {
        "varint": b"\x60" + varint((1 << 64) - 4),  # priority
        "fixed 32": b"\x2d\xff\xff\xff\xff",  # temperature
        "fixed 64": b"\xf9\x07" + b"\xff" * 8,  # an unknown field
        "length-delimited": delimited(4, delimited(1, b"\xff\x7f")),  # token_ids.ids
        "unknown": delimited(2000, BAD),
    }[field]
    assert refused(before + delimited(3, BAD)) == ("text", "is not valid UTF-8")


def test_messages_of_internal_services_are_searched_too() -> None:
    valid = kvstore_pb2.AcquireLeaseRequest(owner="decode/m")
    valid.lease.lease_id = 300
    raw = valid.SerializeToString() + delimited(2, BAD)
    assert refused(raw, kvstore_pb2.AcquireLeaseRequest)[0] == "owner"


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff",
        b"\x1a",
        b"\x1a\x05ab",
        b"\x2d\x00",
        b"\x1f",
        b"\x0c",
        b"\x00",
        b"\xff" * 50,
    ],
    ids=["tag", "length", "value", "fixed 32", "wire type 7", "end of group", "field 0", "overlong varint"],
)
def test_a_message_that_is_malformed_elsewhere_is_named_by_its_type(raw: bytes) -> None:
    field, problem = refused(delimited(2, b"m") + raw)
    assert field == "GenerateRequest"
    assert problem.startswith("is malformed: ")


@pytest.mark.parametrize("num_bytes", range(1, 8))
def test_a_truncated_message_is_not_blamed_on_the_character_that_was_cut(num_bytes: int) -> None:
    raw = inference_pb2.GenerateRequest(text="éäöü").SerializeToString()
    assert refused(raw[:-num_bytes])[0] == "GenerateRequest"


def test_the_search_ends_at_a_varint_that_is_too_long() -> None:
    """Without a limit, its cost is quadratic in the size of the message."""
    assert refused(b"\x60" + b"\x80" * 10 + b"\x00" + delimited(3, BAD))[0] == "GenerateRequest"
    assert refused(b"\x60" + b"\x80" * 9 + b"\x00" + delimited(3, BAD))[0] == "text"


def test_a_large_message_is_not_searched() -> None:
    """The search is slow, and the event loop serves other requests."""
    at_limit = delimited(2000, bytes(MIB - 8)) + delimited(3, BAD)
    assert len(at_limit) == MIB
    assert refused(at_limit)[0] == "text"
    assert refused(at_limit + b"\x60\x00")[0] == "GenerateRequest"


@given(st.binary(max_size=60))
def test_any_bytes_are_either_a_message_or_an_invalid_request(raw: bytes) -> None:
    try:
        expected = inference_pb2.GenerateRequest.FromString(raw)
    except DecodeError:
        refused(raw)
    else:
        assert parse(inference_pb2.GenerateRequest, raw) == expected


@given(st.integers(0, len(VALID.SerializeToString()) - 1), st.integers(0, 255))
def test_a_damaged_byte_raises_no_other_error(index: int, byte: int) -> None:
    raw = bytearray(VALID.SerializeToString())
    raw[index] = byte
    with contextlib.suppress(InvalidRequest):
        parse(inference_pb2.GenerateRequest, bytes(raw))


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (delimited(4, b"\x08\x01" * MAX_FIELDS), "token_ids.ids"),
        (delimited(100, b"\x0a\x00" * MAX_FIELDS), "chat.messages"),
        (delimited(7, delimited(4, b"") * MAX_FIELDS), "decoding.logit_bias"),
        (b"\x60\x01" * (MAX_FIELDS + 1), "priority"),
        (b"\xf8\x07\x80\x80\x00" * (MAX_FIELDS + 1), "(number 127)"),
        (b"\xfb\x07" + b"\xf0\x07\x00" * MAX_FIELDS, "(number 126)"),
    ],
    ids=["unpacked ids", "empty messages", "empty entries", "a field again and again", "unknown fields", "a group"],
)
def test_a_message_of_too_many_fields_is_refused_before_it_is_parsed(raw: bytes, field: str) -> None:
    with pytest.raises(InvalidRequest, match="at most 16384 fields") as caught:
        check_num_fields(inference_pb2.GenerateRequest, raw)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "raw",
    [
        b"\x60\x01" * MAX_FIELDS,
        delimited(4, b"\x08\x01" * (MAX_FIELDS - 1)),
        delimited(4, delimited(1, b"\x01" * 1_000_000)),
        delimited(3, b"x" * 1_000_000),
        b"\xff" * 100_000,
    ],
    ids=["the limit", "the limit, nested", "packed ids", "a text", "malformed"],
)
def test_a_large_message_of_few_fields_passes(raw: bytes) -> None:
    check_num_fields(inference_pb2.GenerateRequest, raw)
