"""Tokenize and Detokenize: arguments to messages, and messages to plain frozen values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from muxmesh.client.option_values import MAX_UINT32, Convert, converted, flag, list_of, text, whole
from muxmesh.client.prompts import Conversation, set_prompt
from muxmesh.errors import InvalidRequest
from muxmesh.v1 import inference_pb2

_TOKEN_IDS = list_of(whole(0, MAX_UINT32))


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A prompt as tokens.

    ``max_model_len`` is the model's context, prompt and output together, in tokens. ``texts`` and ``token_bytes`` have
    one entry for each token if they were requested; a token may be a part of a character, which its bytes tell.
    """

    token_ids: tuple[int, ...]
    max_model_len: int
    texts: tuple[str, ...] = ()
    token_bytes: tuple[bytes, ...] = ()


def _sent(name: str, convert: Convert, value: object) -> Any:
    """The value to send; None is sent as nothing."""
    return None if value is None else converted(name, convert, value)


def tokenize_request(
    prompt: str | Conversation, model: str | None, add_special_tokens: bool | None, with_texts: bool
) -> inference_pb2.TokenizeRequest:
    """Raises InvalidRequest for what cannot be sent."""
    request = inference_pb2.TokenizeRequest(
        model=_sent("model", text, model),
        add_special_tokens=_sent("add_special_tokens", flag, add_special_tokens),
        token_texts=_sent("with_texts", flag, with_texts),
    )
    generation = inference_pb2.GenerateRequest()
    set_prompt(generation, prompt)
    if generation.HasField("text"):
        request.text = generation.text
    elif generation.HasField("chat"):
        request.chat.CopyFrom(generation.chat)
    else:
        raise InvalidRequest("prompt", "is token ids; text or a list of messages is needed")
    return request


def tokenized_of(response: inference_pb2.TokenizeResponse) -> Tokenized:
    """Reads the response."""
    return Tokenized(
        tuple(response.token_ids),
        response.max_model_len,
        tuple(response.token_texts),
        tuple(response.token_bytes),
    )


def detokenize_request(
    token_ids: Sequence[int], model: str | None, skip_special_tokens: bool
) -> inference_pb2.DetokenizeRequest:
    """Raises InvalidRequest for what cannot be sent."""
    return inference_pb2.DetokenizeRequest(
        model=_sent("model", text, model),
        token_ids=_sent("token_ids", _TOKEN_IDS, token_ids),
        skip_special_tokens=_sent("skip_special_tokens", flag, skip_special_tokens),
    )
