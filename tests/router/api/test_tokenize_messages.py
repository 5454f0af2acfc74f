from __future__ import annotations

from typing import Any

import pytest

from muxmesh.errors import InvalidRequest
from muxmesh.models.token_texts import TokenText
from muxmesh.v1 import inference_pb2
from router.api.tokenize_messages import message_from_tokenized, prompt_from_message
from router.generation import ChatMessage, ChatPrompt, TextPrompt, TokenizedPrompt

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def test_a_message_has_a_text_or_a_conversation() -> None:
    assert prompt_from_message(inference_pb2.TokenizeRequest(text="")) == TextPrompt("")
    chat: Any = {"chat": CHAT}
    assert prompt_from_message(inference_pb2.TokenizeRequest(**chat)) == ChatPrompt((ChatMessage("user", "hi"),))


@pytest.mark.parametrize(
    ("fields", "field", "problem"),
    [
        ({}, "text", "exactly one of text, chat is needed; none is set"),
        ({"text": "", "chat": CHAT}, "text", "exactly one of text, chat is needed; both are set"),
        ({"chat": {"messages": [{}] * 1025}}, "chat.messages", "has 1025 entries; at most 1024"),
    ],
)
def test_a_message_that_has_not_exactly_one_prompt_is_refused(fields: dict[str, Any], field: str, problem: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prompt_from_message(inference_pb2.TokenizeRequest(**fields))
    assert (caught.value.field, caught.value.problem) == (field, problem)


def test_an_unknown_field_is_refused() -> None:
    message = inference_pb2.TokenizeRequest(text="hi")
    message.MergeFromString(b"\xf8\x3f\x01")
    with pytest.raises(InvalidRequest, match=r"^\(number 1023\): "):
        prompt_from_message(message)


def test_the_response_has_the_tokens_their_number_and_the_context() -> None:
    assert message_from_tokenized(TokenizedPrompt([5, 6], 100)) == inference_pb2.TokenizeResponse(
        token_ids=[5, 6], num_tokens=2, max_model_len=100
    )


def test_the_text_and_the_bytes_of_each_token_are_in_the_response_on_request() -> None:
    texts = [TokenText(" é", " é".encode()), TokenText("\ufffd", b"\xc3")]
    response = message_from_tokenized(TokenizedPrompt([5, 6], 100, texts))
    assert list(response.token_texts) == [" é", "\ufffd"]
    assert list(response.token_bytes) == [" é".encode(), b"\xc3"]
