"""Incremental detokenizer of one output, over Hugging Face `tokenizers`. Knows no stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_CONTEXT_TOKENS = 6
"""Last tokens of the prompt that a detokenizer starts with."""


class Detokenizer:
    """Decodes an output token by token and never returns a part of a UTF-8 character.

    The last tokens of the prompt are fed first and their text is discarded: some decoders drop a space at the beginning
    of a text, and the output continues the text of the prompt. Not thread-safe.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._pending: list[int] = []
        for token_id in prompt_token_ids[-_CONTEXT_TOKENS:]:
            self.feed(token_id)
        self._pending.clear()

    def feed(self, token_id: int) -> str:
        """Returns the text that ``token_id`` completes; empty while a character is incomplete."""
        self._pending.append(token_id)
        text = self._stream.step(self._tokenizer, token_id)
        if text is None:
            return ""
        self._pending.clear()
        return text

    def flush(self) -> str:
        """Returns the text that is left at the end of the output: an incomplete character becomes U+FFFD."""
        rest = self._tokenizer.decode(self._pending, skip_special_tokens=self._skip)
        self._pending.clear()
        return rest
