"""Any value that a program hands to the client is sent, or refused by its name: nothing else happens to it."""

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from muxmesh.addresses import check_address, is_loopback
from muxmesh.cli.message_lines import MessageLines, command_of
from muxmesh.client import MeshClient, Message, RequestOptions
from muxmesh.client.prompts import set_prompt
from muxmesh.client.request_options import request_of
from muxmesh.errors import InvalidRequest
from muxmesh.v1 import inference_pb2
from tests.support.fuzzing import fuzz

OPTIONS = sorted(RequestOptions.__annotations__)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)) | st.binary(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.integers() | st.sampled_from(["role", "content", "type"]), inner, max_size=3)
        | st.builds(Message, inner, inner)
        | st.sets(st.integers(), max_size=3)
    ),
    max_leaves=8,
)


def outcome(call: Callable[..., Any], *arguments: Any) -> tuple[Any, InvalidRequest | None]:
    """What the call returns, or the short error of one line that it raises."""
    try:
        return call(*arguments), None
    except InvalidRequest as error:
        return None, one_line(error)


def one_line(error: InvalidRequest) -> InvalidRequest:
    assert len(str(error)) < 400 and "\n" not in str(error)
    return error


@fuzz(quick=100, part=0.02)
@given(st.dictionaries(st.sampled_from(OPTIONS), VALUES, max_size=4))
def test_any_value_of_an_option_is_sent_or_refused_by_the_options_name(options: dict[str, Any]) -> None:
    request, error = outcome(request_of, options)
    if error is not None:
        assert error.field in options
    else:
        assert inference_pb2.GenerateRequest.FromString(request.SerializeToString()) == request


@fuzz(quick=100, part=0.02)
@given(VALUES)
def test_any_prompt_is_sent_or_refused(prompt: Any) -> None:
    request = inference_pb2.GenerateRequest()
    _, error = outcome(set_prompt, request, prompt)
    if error is not None:
        assert error.field.startswith("prompt")
    else:
        fields = [field.name for field, _ in request.ListFields()]
        assert len(fields) == 1 and fields[0] in ("text", "token_ids", "chat")


PARTS = st.sampled_from(
    ["127.0.0.1", "localhost", "[", "]", "::1", ":", ",", "/", "ipv4:", "dns:", "unix:", "http://", "1"]
)


@fuzz(quick=100, part=0.02)
@given(st.lists(PARTS | st.text(max_size=5), max_size=8).map("".join) | VALUES)
def test_any_address_makes_a_client_or_is_refused(address: Any) -> None:
    _, error = outcome(MeshClient, address)
    if error is not None:
        assert error.field == "address"
    else:
        assert is_loopback(check_address(address)) in (True, False)


@fuzz(quick=100, part=0.02)
@given(st.lists(st.text(st.sampled_from('"/a \n\r\t'), max_size=12), max_size=8))
def test_any_lines_of_a_chat_are_messages_without_the_blanks_around_them(lines: list[str]) -> None:
    reader = MessageLines()
    for line in lines:
        message = reader.add(line)
        assert (message is None) == reader.is_open
        if message is not None:
            assert message == message.strip()
            command = command_of(message)
            assert command is None or message.startswith(command)
