"""Runs tokenizers in threads: a long prompt takes milliseconds, and tokenizers release the GIL.

Long prompts have threads of their own, in which one is tokenized at a time, so short ones never wait for them. A model
renders one long conversation at a time: a short one waits for the rendering in progress, and at most one more. A prompt
that waits and is cancelled is never rendered or tokenized; one that is certainly too long for the context is refused
before it is tokenized.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import TypeVar
from weakref import WeakKeyDictionary

from muxmesh.errors import InvalidRequest, Overloaded
from muxmesh.models.token_texts import TokenText
from muxmesh.models.tokenizer import TextModel
from router.generation import ChatPrompt, Prompt, TextPrompt, TokensPrompt
from router.served_models import ServedModel

_LONG_CHARS = 16_384
_LONG_TOKENS = 16_384
_TURN_BYTES = 64
"""What a turn of a conversation counts for beside its content: the work of a template grows with their number too."""

R = TypeVar("R")


class PromptTokenizer:
    """Converts prompts to token ids and token ids to text, off the event loop."""

    def __init__(self, short: Executor, long: Executor, max_waiting_bytes: int) -> None:
        """``max_waiting_bytes``: text of the long prompts that wait or are tokenized."""
        self._short = short
        self._long = long
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting_bytes = 0
        self._one_at_a_time = asyncio.Lock()
        self._rendering: WeakKeyDictionary[TextModel, asyncio.Lock] = WeakKeyDictionary()
        """By model: held while a long conversation is rendered."""

    async def encode(
        self,
        prompt: Prompt,
        model: ServedModel,
        add_special_tokens: bool | None = None,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Token ids of a prompt.

        ``add_special_tokens``: the tokenizer's own, such as a first token. None: for text only, since a template writes
        them itself. A long prompt that certainly has more than ``max_tokens`` is refused without being tokenized.

        Raises InvalidRequest for a prompt that is too long, or a conversation that the model's template rejects;
        Overloaded if too much text waits.
        """
        if isinstance(prompt, TokensPrompt):
            return list(prompt.token_ids)
        adds = isinstance(prompt, TextPrompt) if add_special_tokens is None else add_special_tokens
        num_bytes = _num_bytes(prompt)
        with self._waiting(num_bytes):
            if isinstance(prompt, TextPrompt):
                text = prompt.text
            else:
                text = await self._rendered(prompt, model.text, is_long=num_bytes > _LONG_CHARS)
            if len(text) <= _LONG_CHARS:
                return await _run(self._short, lambda: model.text.encode(text, adds))
            if max_tokens is not None and await _run(
                self._long, lambda: model.text.certainly_exceeds(text, max_tokens)
            ):
                field = "text" if isinstance(prompt, TextPrompt) else "chat.messages"
                raise InvalidRequest(field, f"is more than {max_tokens} tokens, the most that fit")
            async with self._one_at_a_time:
                return await _run(self._long, lambda: model.text.encode(text, adds))

    async def texts(self, token_ids: Sequence[int], model: ServedModel) -> list[TokenText]:
        """The text of each token."""
        threads = self._long if len(token_ids) > _LONG_TOKENS else self._short
        return await _run(threads, lambda: [model.text.token_texts[one] for one in token_ids])

    async def decode(self, token_ids: Sequence[int], model: ServedModel, skip_special_tokens: bool) -> str:
        """Text of token ids that the model knows."""
        threads = self._long if len(token_ids) > _LONG_TOKENS else self._short
        return await _run(threads, lambda: model.text.decode(token_ids, skip_special_tokens))

    async def _rendered(self, chat: ChatPrompt, text_model: TextModel, is_long: bool) -> str:
        turns = [{"role": turn.role, "content": turn.content} for turn in chat.messages]
        if not is_long:
            return await asyncio.wrap_future(text_model.submit_chat(turns))
        async with self._rendering.setdefault(text_model, asyncio.Lock()):
            return await asyncio.wrap_future(text_model.submit_chat(turns))

    @contextmanager
    def _waiting(self, num_bytes: int) -> Iterator[None]:
        """Counts the text of a long prompt. Raises Overloaded."""
        if num_bytes <= _LONG_CHARS:
            num_bytes = 0
        elif self._waiting_bytes and self._waiting_bytes + num_bytes > self._max_waiting_bytes:
            raise Overloaded(
                f"{self._waiting_bytes} bytes of long prompts wait to be tokenized and {num_bytes} would be "
                f"added; at most {self._max_waiting_bytes} may wait"
            )
        self._waiting_bytes += num_bytes
        try:
            yield
        finally:
            self._waiting_bytes -= num_bytes


def _num_bytes(prompt: TextPrompt | ChatPrompt) -> int:
    if isinstance(prompt, TextPrompt):
        return len(prompt.text.encode())
    return sum(_TURN_BYTES + len(message.content.encode()) for message in prompt.messages)


async def _run(threads: Executor, function: Callable[[], R]) -> R:
    return await asyncio.get_running_loop().run_in_executor(threads, function)
