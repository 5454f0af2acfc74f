"""Runs tokenizers in threads: a long prompt takes milliseconds, and tokenizers release the GIL."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor

from muxmesh.models.token_texts import TokenText
from router.generation import Prompt, TextPrompt, TokensPrompt
from router.served_models import ServedModel


class PromptTokenizer:
    """Converts prompts to token ids and token ids to text, off the event loop."""

    def __init__(self, threads: Executor) -> None:
        self._threads = threads

    async def encode(self, prompt: Prompt, model: ServedModel, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids of a prompt. Raises InvalidRequest for a conversation that the model's template rejects.

        ``add_special_tokens``: the tokenizer's own, such as a first token. None: for text only, since a template writes
        them itself.
        """
        if isinstance(prompt, TokensPrompt):
            return list(prompt.token_ids)
        loop = asyncio.get_running_loop()
        if isinstance(prompt, TextPrompt):
            adds = True if add_special_tokens is None else add_special_tokens
            return await loop.run_in_executor(self._threads, model.text.encode, prompt.text, adds)
        messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
        text = await asyncio.wrap_future(model.text.submit_chat(messages))
        return await loop.run_in_executor(self._threads, model.text.encode, text, bool(add_special_tokens))

    async def texts(self, token_ids: Sequence[int], model: ServedModel) -> list[TokenText]:
        """The text of each token."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: [model.text.token_texts[one] for one in token_ids])

    async def decode(self, token_ids: Sequence[int], model: ServedModel, skip_special_tokens: bool) -> str:
        """Text of token ids that the model knows."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, model.text.decode, token_ids, skip_special_tokens)
