"""What a client may send as a prompt, and how it is put into a request message.

It checks what the wire cannot carry and names the part that does not fit. Roles and limits are the router's to check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from muxmesh.client.option_values import MAX_UINT32, converted, elements, text, whole
from muxmesh.errors import InvalidRequest
from muxmesh.quoting import quoted
from muxmesh.v1 import inference_pb2


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. ``role`` is system, user or assistant."""

    role: str
    content: str


Conversation = Sequence[Message | Mapping[str, str]]
Prompt = str | Sequence[int] | Conversation
"""Plain text, token ids, or a conversation for the model's chat template.

A turn of a conversation is a `Message` or a dictionary ``{"role": ..., "content": ...}``.
"""

_KINDS = "text, token ids or a list of messages is needed"
_TURN_KEYS = {"role", "content"}
_TOKEN_ID = whole(0, MAX_UINT32)


def set_prompt(request: inference_pb2.GenerateRequest, prompt: Prompt) -> None:
    """Sets the field of ``request`` that fits the kind of prompt. Raises InvalidRequest."""
    if isinstance(prompt, str):
        request.text = converted("prompt", text, prompt)
        return
    if isinstance(prompt, Message | Mapping):
        raise InvalidRequest("prompt", "is one message; a list of messages is needed")
    parts = _parts(prompt)
    if parts and isinstance(parts[0], Message | Mapping):
        turns = (_turn(f"prompt[{index}]", part) for index, part in enumerate(parts))
        request.chat.messages.extend(turns)
    else:
        request.token_ids.ids.extend(_token_id(index, part) for index, part in enumerate(parts))
        request.token_ids.SetInParent()


def _parts(prompt: object) -> list[Any]:
    """The elements of a list, an array or any other collection with an order."""
    if isinstance(prompt, bytes | bytearray | memoryview | Set) or (parts := elements(prompt)) is None:
        raise InvalidRequest("prompt", f"is {quoted(prompt)}; {_KINDS}")
    return parts


def _token_id(index: int, part: object) -> int:
    if isinstance(part, str | Message | Mapping):
        raise InvalidRequest("prompt", f"has {quoted(part)} at index {index}; {_KINDS}")
    return int(converted(f"prompt[{index}]", _TOKEN_ID, part))


def _turn(where: str, part: object) -> inference_pb2.ChatMessage:
    if isinstance(part, Message):
        role, content = part.role, part.content
    elif isinstance(part, Mapping):
        if part.keys() != _TURN_KEYS:
            raise InvalidRequest(where, f'has the keys {quoted(list(part))}; exactly "role" and "content" are needed')
        role, content = part["role"], part["content"]
    else:
        raise InvalidRequest(where, f'is {quoted(part)}; a Message or {{"role", "content"}} is needed')
    return inference_pb2.ChatMessage(
        role=converted(f"{where}.role", text, role), content=converted(f"{where}.content", text, content)
    )
