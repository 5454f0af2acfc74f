"""Incremental detokenizer over the decoders of Hugging Face `tokenizers`. Knows no stop strings.

``TokenPieces`` knows what one token is (characters, bytes or nothing), ``Detokenizer`` joins the tokens of one output.
Neither rereads what has been decoded: the work for a token does not grow with the output, whatever its ids are.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from functools import lru_cache

from tokenizers import Tokenizer

from muxmesh.errors import ModelUnsupported
from muxmesh.models.tokenizer_steps import component_steps

_CONTEXT_TOKENS = 6
"""Tokens that a decoder sees before a new one. More than the bytes of an incomplete character."""
_MAX_CONTEXT_LOOKBACK = 64
"""Last tokens of the prompt among which the context is looked for: some have no text."""
_MAX_CACHED_TEXTS = 65_536
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACE_EACH_BYTE = "muxmesh.replace_each_byte"

codecs.register_error(_REPLACE_EACH_BYTE, lambda error: ("\ufffd" * (error.end - error.start), error.end))  # type: ignore[attr-defined]


class TokenPieces(dict[int, "str | bytes | None"]):
    """The tokens of a tokenizer by id, filled on demand: characters, bytes of UTF-8, or None for no text at all.

    None is an id without a token and, with ``skip_special_tokens``, a special token. Thread-safe.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        """Raises ModelUnsupported if the tokenizer's decoder does not decode every text."""
        super().__init__()
        self._tokenizer = tokenizer
        self._decoder = tokenizer.decoder
        self._skipped = frozenset(special_token_ids(tokenizer)) if skip_special_tokens else frozenset()
        steps = list(component_steps(tokenizer.decoder))
        kinds = {str(step["type"]) for step in steps}
        if any(step["type"] == "Strip" and step["stop"] for step in steps):
            raise ModelUnsupported("tokenizer.json: decoder: Strip with `stop` above 0; 0 is supported")
        self._byte_fallback = "ByteFallback" in kinds
        self._byte_level = "ByteLevel" in kinds
        self.are_joined = self._byte_level and kinds <= {"ByteLevel", "Fuse"}
        """True if a text is its pieces one after the other; False if a decoder must see them in context."""
        self.errors = _REPLACE_EACH_BYTE if self._byte_fallback else "replace"
        """Error handler of `codecs` for bytes that are not UTF-8."""
        self.text_alone = lru_cache(_MAX_CACHED_TEXTS)(lambda token: self.text_of([token]))
        """Text of one token without context."""
        before = self.text_of(["a"])
        self.only_the_first_differs = before != "" and _only_the_first_differs([str(step["type"]) for step in steps])
        """True if a token adds the same to every text that is not empty: `text_added`."""
        self.text_added = lru_cache(_MAX_CACHED_TEXTS)(lambda token: self.text_of(["a", token])[len(before) :])

    def __missing__(self, token_id: int) -> str | bytes | None:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:  # not cached: any number may be asked for
            return None
        piece = None if token in self._skipped else self._piece_of(token)
        self[token_id] = piece
        return piece

    def text_of(self, tokens: Sequence[str]) -> str:
        """Text of ``tokens``, as the tokenizer's decoder joins them."""
        return str(self._decoder.decode(tokens)) if self._decoder is not None else " ".join(tokens)

    def as_token(self, characters: str) -> str:
        """The token that the decoder reads as ``characters``."""
        return "".join(BYTE_CHARACTERS[byte] for byte in characters.encode()) if self._byte_level else characters

    def _piece_of(self, token: str) -> str | bytes:
        if self._byte_level:
            return _characters_or_bytes(bytes_of_token(token))
        match = _BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        return bytes([int(match[1], 16)]) if match else token


class Detokenizer:
    """Decodes an output token by token and never returns a part of a character. Not thread-safe.

    Invariant: all returned texts and `flush` together are the tokenizer's decode of prompt and output, less that of the
    prompt. There are two exceptions, both for bytes that are not UTF-8:

    - In a run of byte tokens (``<0xC3>``) each invalid byte is one U+FFFD and the valid characters stay, as in
      SentencePiece; `tokenizers` would replace the valid ones too, which may have been sent already.
    - An output that completes the last character of the prompt begins with this character. Otherwise the incomplete
      bytes of the prompt have no part in the output.
    """

    def __init__(self, pieces: TokenPieces, prompt_token_ids: Sequence[int] = ()) -> None:
        """The last tokens of the prompt are the context: some decoders drop a space at the beginning of a text."""
        self._pieces = pieces
        self._incomplete = b""
        self._num_prompt_bytes = 0  # of `_incomplete`
        self._context: list[str] = []
        self._context_text = ""
        for token_id in _context_of(pieces, prompt_token_ids):
            self.feed(token_id)
        self._num_prompt_bytes = len(self._incomplete)

    def feed(self, token_id: int) -> str:
        """Returns the text that ``token_id`` completes; empty while a character is incomplete."""
        piece = self._pieces[token_id]
        if piece is None:
            return ""
        if isinstance(piece, bytes):
            characters = self._characters(piece)
            return self._add(characters) if characters else ""
        before = self.flush() if self._incomplete else ""
        return before + self._add(piece)

    def flush(self) -> str:
        """Returns the text that is left at the end of the output: an incomplete character becomes U+FFFD."""
        characters = self._characters(b"", is_last=True)
        return self._add(characters) if characters else ""

    def _characters(self, new: bytes, is_last: bool = False) -> str:
        """The characters that ``new`` completes. Keeps an incomplete one, at most 3 bytes, unless ``is_last``."""
        data = self._incomplete + new
        if self._num_prompt_bytes and not _begins_with_a_character(data, is_last):
            data = data[self._num_prompt_bytes :]
            self._num_prompt_bytes = 0
        text, num_decoded = codecs.utf_8_decode(data, self._pieces.errors, is_last)
        if num_decoded:
            self._num_prompt_bytes = 0
        self._incomplete = data[num_decoded:]
        return text

    def _add(self, characters: str) -> str:
        """What ``characters`` add to the text of the tokens before them."""
        if self._pieces.are_joined:
            return characters
        token = self._pieces.as_token(characters)
        if self._context_text and self._pieces.only_the_first_differs:
            return self._pieces.text_added(token)
        before, text = self._context_text, self._pieces.text_of([*self._context, token])
        alone = self._pieces.text_alone(token)
        if alone:
            self._context, self._context_text = [token], alone
        elif len(self._context) < _CONTEXT_TOKENS:  # the decoder may have dropped this text only because it comes first
            self._context, self._context_text = [*self._context, token], text
        num_same = len(before) if text.startswith(before) else _num_same(before, text)
        return text[num_same:]


def special_token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the special tokens by their text."""
    return {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def _context_of(pieces: TokenPieces, prompt_token_ids: Sequence[int]) -> list[int]:
    """The last tokens of the prompt that have text."""
    recent = prompt_token_ids[-_MAX_CONTEXT_LOOKBACK:]
    return [token_id for token_id in recent if pieces[token_id] is not None][-_CONTEXT_TOKENS:]


def _only_the_first_differs(kinds: Sequence[str]) -> bool:
    """True if decoders treat all tokens alike, other than those at the beginning of a text."""
    per_token = {"Replace", "ByteFallback", "Metaspace", "Strip", "WordPiece"}
    joined = next((index for index, kind in enumerate(kinds) if kind in {"ByteLevel", "Fuse"}), len(kinds))
    return per_token.issuperset(kinds[:joined]) and {"Fuse", "Strip"}.issuperset(kinds[joined + 1 :])


def _num_same(one: str, other: str) -> int:
    """Number of characters at the beginning that two texts share."""
    return next((index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))


def _begins_with_a_character(data: bytes, is_last: bool) -> bool:
    """True if ``data`` begins with a character or, unless ``is_last``, with an incomplete one."""
    try:
        codecs.utf_8_decode(data, "strict", is_last)
    except UnicodeDecodeError as error:
        return error.start > 0
    return True


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level tokens: GPT-2's `bytes_to_unicode`."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in shown]
    return [chr(byte if byte in shown else 0x100 + hidden.index(byte)) for byte in range(0x100)]


BYTE_CHARACTERS = _byte_characters()
_BYTE_OF = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def bytes_of_token(token: str) -> bytes:
    """Bytes of a byte-level token. An added token with other characters stands for itself."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


def _characters_or_bytes(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data
