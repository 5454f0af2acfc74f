"""Converts the messages of Tokenize and Detokenize to the router's own values and back. Pure."""

from __future__ import annotations

from muxmesh.errors import InvalidRequest
from muxmesh.v1 import inference_pb2
from router.api.generate_messages import chat_prompt, check_message
from router.generation import Prompt, TextPrompt, TokenizedPrompt


def prompt_from_message(message: inference_pb2.TokenizeRequest) -> Prompt:
    """The prompt of ``message``. Raises InvalidRequest unless it is exactly one."""
    check_message(message)
    if message.HasField("text") == message.HasField("chat"):
        found = "both are set" if message.HasField("text") else "none is set"
        raise InvalidRequest("text", f"exactly one of text, chat is needed; {found}")
    return TextPrompt(message.text) if message.HasField("text") else chat_prompt(message.chat)


def message_from_tokenized(tokenized: TokenizedPrompt) -> inference_pb2.TokenizeResponse:
    """Converts the tokens of a prompt."""
    return inference_pb2.TokenizeResponse(
        token_ids=tokenized.token_ids,
        num_tokens=len(tokenized.token_ids),
        max_model_len=tokenized.max_model_len,
        token_texts=[one.text for one in tokenized.texts],
        token_bytes=[one.token_bytes for one in tokenized.texts],
    )
