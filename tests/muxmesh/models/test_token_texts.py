from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from muxmesh.models.detokenizer import TokenPieces
from muxmesh.models.token_texts import TokenText, TokenTexts
from muxmesh.models.tokenizer import byte_tokenizer

LLAMA_2 = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def texts(decoder: decoders.Decoder | None, *tokens: str) -> dict[str, TokenText]:
    """Token → its text, of a vocabulary with ``tokens`` and a special one."""
    vocabulary = {token: index for index, token in enumerate([*tokens, "<|end of text|>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0]))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("<|end of text|>", special=True)])
    found = TokenTexts(TokenPieces(tokenizer, False))
    return {token: found[token_id] for token, token_id in vocabulary.items()}


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [
        (decoders.ByteLevel(), {"Ġa": b" a", "Ã©": "é".encode(), "Ã": b"\xc3", "aÃ": b"a\xc3", "ĺĢ": b"\x98\x80"}),
        (decoders.Sequence(LLAMA_2), {"▁sunny": b" sunny", "▁": b" ", "a": b"a", "<0xC3>": b"\xc3", "é": "é".encode()}),
        (decoders.Metaspace(), {"▁sunny": b" sunny", "a": b"a"}),
        (decoders.WordPiece(), {"word": b" word", "##s": b"s"}),
        (decoders.BPEDecoder(suffix="</w>"), {"end</w>": b"end", "mid": b"mid"}),
        (None, {"word": b" word"}),
    ],
    ids=["byte level", "Llama 2", "metaspace", "WordPiece", "BPE", "none"],
)
def test_a_token_has_the_bytes_that_it_adds_to_an_output(
    decoder: decoders.Decoder | None, expected: dict[str, bytes]
) -> None:
    found = texts(decoder, *expected)
    for token, token_bytes in expected.items():
        assert found[token] == TokenText(token_bytes.decode(errors="replace"), token_bytes)
    assert found["<|end of text|>"].text.strip() == "<|end of text|>"


def test_the_bytes_of_byte_tokens_join_to_the_text() -> None:
    tokenizer = byte_tokenizer()
    found, text = TokenTexts(TokenPieces(tokenizer, False)), "naïve 日本 🎉"
    token_ids = tokenizer.encode(text).ids
    assert b"".join(found[token_id].token_bytes for token_id in token_ids).decode() == text


def test_an_id_without_a_token_has_no_text_and_is_not_kept() -> None:
    found = TokenTexts(TokenPieces(byte_tokenizer(), False))
    assert found[9999] == TokenText("", b"")
    assert 9999 not in found and found[5] and 5 in found
