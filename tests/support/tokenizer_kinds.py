"""Tiny tokenizers of every kind: how they join tokens, what are characters and what bytes, special and added tokens."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models

from muxmesh.models.tokenizer import byte_tokenizer

WORDS = ["a", "b", "ab", "▁", "▁a", "▁▁", " ", "é", "日本", "\ufffd", "##b", "b</w>", "</w>", ".", "|", "<0x4", "don't"]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in (0x20, 0x41, 0x80, 0x9F, 0xA9, 0x98, 0xC3, 0xE2, 0xF0, 0xFF)]
LLAMA_2 = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def with_added_tokens(tokenizer: Tokenizer, decoder: decoders.Decoder | None) -> Tokenizer:
    """A tokenizer with two special tokens, of which one looks like text, and two added ones that are not special."""
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("▁x", special=True)])
    tokenizer.add_tokens([AddedToken("two words é", special=False), AddedToken(" b", special=False)])
    return tokenizer


def words(decoder: decoders.Decoder | None, *more: str) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate([*more, *WORDS])}
    return with_added_tokens(Tokenizer(models.WordLevel(vocabulary, unk_token="a")), decoder)


def byte_level(decoder: decoders.Decoder) -> Tokenizer:
    """Tokens of one byte and of several bytes, of which some begin or end inside a character."""
    several = ["Ġ", "Ġa", "Ã", "aÃ", "©", "©b", "Ã©", "ðŁ", "ĺĢ", "ĺĢĠðŁ", "ï¿½", "â"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*several, *byte_tokenizer().get_vocab()]))}
    return with_added_tokens(Tokenizer(models.BPE(vocabulary, [])), decoder)


def unigram() -> Tokenizer:
    pieces = [(token, -1.0) for token in [*BYTE_TOKENS, *WORDS]]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    return with_added_tokens(tokenizer, decoders.Sequence(LLAMA_2[:3]))


def byte_fallback_bpe() -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate([*BYTE_TOKENS, *WORDS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    return with_added_tokens(tokenizer, decoders.Sequence(LLAMA_2))


def wordpiece() -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(WORDS)}
    return with_added_tokens(Tokenizer(models.WordPiece(vocabulary, unk_token="a")), decoders.WordPiece())


TOKENIZERS = {
    "byte level": byte_level(decoders.ByteLevel()),
    "byte level, then others": byte_level(decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])),
    "byte fallback": byte_fallback_bpe(),
    "byte fallback without a dropped space": unigram(),
    "wordpiece": wordpiece(),
    "metaspace": words(decoders.Metaspace(), ""),
    "words with a suffix": words(decoders.BPEDecoder()),
    "ctc": words(decoders.CTC("ab"), "<pad>"),
    "stripped twice": words(decoders.Sequence([decoders.Fuse(), decoders.Strip("a", 2, 0)]), ""),
    "replaced patterns": words(decoders.Sequence([decoders.Replace(Regex("a+"), "_"), decoders.Fuse()])),
    "no decoder": words(None),
}
"""Tokenizers by the rule that joins their tokens."""
