"""Text and bytes of single tokens, as log-probabilities and Tokenize report them. Knows no sequences."""

from __future__ import annotations

from typing import NamedTuple

from muxmesh.models.detokenizer import TokenPieces


class TokenText(NamedTuple):
    """One token: its bytes, which may be a part of a character, and its text, in which such bytes are U+FFFD."""

    text: str
    token_bytes: bytes


_NOTHING = TokenText("", b"")


class TokenTexts(dict[int, TokenText]):
    """The text of each token by its id, filled on demand; special tokens have their names. Thread-safe.

    The text is what the token adds to an output, with the space that it begins with. An id without a token has none.
    """

    def __init__(self, pieces: TokenPieces) -> None:
        super().__init__()
        self._pieces = pieces

    def __missing__(self, token_id: int) -> TokenText:
        piece = self._pieces[token_id]
        if piece is None:  # not cached: any number may be asked for
            return _NOTHING
        if isinstance(piece, bytes):
            self[token_id] = TokenText(piece.decode(errors="replace"), piece)
        else:
            text = piece if self._pieces.are_joined else self._pieces.text_added(self._pieces.as_token(piece))
            self[token_id] = TokenText(text, text.encode())
        return self[token_id]
