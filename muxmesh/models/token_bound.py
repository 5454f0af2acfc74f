"""A lower bound for the number of tokens of a text, from the vocabulary alone: certain, and faster than to tokenize.

Each token stands for a piece of the text that the vocabulary has. In a window of the text, the tokens are no longer
than the longest piece that occurs there, and have no more digits than any piece has. Merges and pre-tokenizers only
raise the number. Tokenizers that may drop or shorten text have no bound.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models

from muxmesh.models.detokenizer import BYTE_CHARACTERS, bytes_of_token
from muxmesh.models.tokenizer_steps import component_steps

_WINDOW_BYTES = 16_384
_NUM_LONGEST = 64
"""Pieces that are looked for in each window."""
_DIGITS = b"0123456789"
_DIGIT = re.compile("[0-9]")
_SPACE = "\u2581"
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
_LOSSLESS_PRE_TOKENIZERS = {"ByteLevel", "Digits", "Split", "Punctuation", "Metaspace"}


@dataclass(frozen=True, slots=True)
class TokenBound:
    """The longest pieces of a vocabulary.

    ``longest``: longest first. No other piece is longer than ``other_bytes``, none has more than ``most_digits``.
    ``unknown_bytes`` have no token and count for nothing. ``needs_nfc``: the tokenizer converts to NFC, so the bound
    holds for texts in that form only.
    """

    longest: tuple[bytes, ...]
    other_bytes: int
    most_digits: int
    unknown_bytes: bytes
    needs_nfc: bool

    def is_exceeded(self, text: str, num_tokens: float) -> bool:
        """True if ``text`` has more than ``num_tokens`` tokens for certain."""
        if self.needs_nfc and not unicodedata.is_normalized("NFC", text):
            return False
        raw, most, least = text.encode().translate(None, self.unknown_bytes), len(self.longest[0]), 0
        for start in range(0, len(raw), _WINDOW_BYTES):
            end = min(start + _WINDOW_BYTES, len(raw))
            around = raw[max(0, start - most) : end + most]
            by_length = -(-(end - start) // self._longest_in(around))
            num_digits = end - start - len(raw[start:end].translate(None, _DIGITS))
            # One token of a window may belong to the next one too.
            least += max(by_length, -(-num_digits // self.most_digits)) - 1
            if least > num_tokens:
                return True
        return False

    def _longest_in(self, raw: bytes) -> int:
        """Bytes of the longest piece in ``raw``. A tokenizer may write a space before a text: a first one is free."""
        for piece in self.longest:
            if (piece[1:] if piece.startswith(b" ") else piece) in raw:
                return len(piece)
        return self.other_bytes


def token_bound(tokenizer: Tokenizer) -> TokenBound | None:
    """The bound of a tokenizer; None if its tokens may stand for more text than they have."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    byte_level = any(step["type"] == "ByteLevel" for step in component_steps(tokenizer.pre_tokenizer))
    if not _is_lossless(tokenizer, vocabulary, byte_level):
        return None
    unknown = [byte for byte, character in enumerate(BYTE_CHARACTERS) if byte_level and character not in vocabulary]
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    longest_first = sorted(vocabulary, key=_num_bytes if not byte_level else len, reverse=True)[: _NUM_LONGEST + 1]
    to_bytes = bytes_of_token if byte_level else _bytes_of_piece
    pieces = sorted([*map(to_bytes, longest_first), *map(str.encode, added)], key=len, reverse=True)
    if not pieces or len(pieces[0]) > _WINDOW_BYTES:
        return None
    most_digits = max(len(_DIGIT.findall(token)) for token in (*vocabulary, *added))
    needs_nfc = any(step["type"] == "NFC" for step in component_steps(tokenizer.normalizer))
    other_bytes = len(pieces[min(_NUM_LONGEST, len(pieces) - 1)])
    return TokenBound(tuple(pieces[:_NUM_LONGEST]), max(1, other_bytes), max(1, most_digits), bytes(unknown), needs_nfc)


def _is_lossless(tokenizer: Tokenizer, vocabulary: Mapping[str, int], byte_level: bool) -> bool:
    """True if every byte of a text that has a token belongs to exactly one, and to its piece."""
    model = tokenizer.model
    if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    has_all_bytes = byte_level or (model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)))
    return (
        has_all_bytes
        and all(
            step["type"] in _LOSSLESS_PRE_TOKENIZERS and step.get("behavior") != "Removed"
            for step in component_steps(tokenizer.pre_tokenizer)
        )
        and all(_keeps_length(step) for step in component_steps(tokenizer.normalizer))
        and not any(token.lstrip or token.rstrip for token in tokenizer.get_added_tokens_decoder().values())
    )


def _keeps_length(normalizer: dict[str, Any]) -> bool:
    kind = normalizer["type"]
    writes_spaces = kind == "Replace" and normalizer["pattern"] == {"String": " "} and normalizer["content"] == _SPACE
    return kind in ("NFC", "Prepend") or writes_spaces


def _bytes_of_piece(token: str) -> bytes:
    """A byte token stands for one byte."""
    return b"?" if _BYTE_TOKEN.fullmatch(token) else token.replace(_SPACE, " ").encode()


def _num_bytes(token: str) -> int:
    return len(_bytes_of_piece(token))
