"""The bound is never above what the tokenizer counts, for tokenizers of each kind, and near it where it matters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from muxmesh.models.token_bound import token_bound
from muxmesh.models.tokenizer import TextModel, byte_tokenizer

TEXTS = [
    "The year 1984 and the number 1234567 are in this sentence, which the trainer sees again and again. " * 5,
    "    indented\n\n\n        more\n================================\n" * 20,
    "Caf\u00e9 na\u00efve \u4f60\u597d\uff0c\u4e16\u754c " * 30,
]
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def byte_level(*, digits: bool = False, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """Byte-level BPE as GPT-2's, trained on `TEXTS`."""
    tokenizer = Tokenizer(models.BPE())
    before = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    special = [AddedToken("<|im_start|>", special=True)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=ALPHABET, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def without_some_bytes() -> Tokenizer:
    """Characters that have no token are dropped before the merges, so tokens reach over them."""
    vocabulary = {token: index for index, token in enumerate(["a", "b", "ab", "abab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("ab", "ab")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """BPE with byte fallback over words that begin with a space, as Llama 2's."""
    tokens = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "a",
        "b",
        "\u2581a",
        "\u2581ab",
        "ab",
        "1",
        "11",
    ]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [("\u2581", "a"), ("\u2581a", "b"), ("a", "b"), ("1", "1")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return tokenizer


BOUNDED: dict[str, Tokenizer] = {
    "bytes": byte_tokenizer(),
    "byte level": byte_level(),
    "single digits": byte_level(digits=True),
    "NFC": byte_level(normalizer=normalizers.NFC()),
    "some bytes missing": without_some_bytes(),
    "sentencepiece": sentencepiece(),
}
PARTS = [
    "The year ",
    "1984",
    "ab",
    "abab",
    "a",
    " ",
    "        ",
    "\n\n\n",
    "=" * 40,
    "\u00e9",
    "e\u0301",
    "\u4f60\u597d",
    "\x04",
    "<|im_start|>",
]


@pytest.mark.parametrize("tokenizer", BOUNDED.values(), ids=BOUNDED.keys())
@given(parts=st.lists(st.sampled_from(PARTS) | st.text(max_size=5), max_size=20), repeats=st.integers(1, 3000))
def test_no_text_has_fewer_tokens_than_its_bound(tokenizer: Tokenizer, parts: list[str], repeats: int) -> None:
    text = ("".join(parts) * repeats)[:20_000]
    bound = token_bound(tokenizer)
    assert bound is not None
    assert not bound.is_exceeded(text, len(tokenizer.encode(text, add_special_tokens=False).ids))


@pytest.mark.parametrize(
    ("name", "text", "num_tokens"),
    [
        ("bytes", "x" * 100_000, 99_000),
        ("single digits", "1234567890" * 10_000, 99_000),
        ("byte level", "\u4e16" * 50_000, 10_000),
        ("byte level", "qz" * 50_000, 10_000),
        ("sentencepiece", "1" * 100_000, 49_000),
    ],
)
def test_a_text_of_many_tokens_exceeds_the_bound(name: str, text: str, num_tokens: int) -> None:
    bound = token_bound(BOUNDED[name])
    assert bound is not None
    assert bound.is_exceeded(text, num_tokens)
    assert len(BOUNDED[name].encode(text).ids) > num_tokens


def dropping(change: Callable[[Tokenizer], None]) -> Tokenizer:
    tokenizer = byte_tokenizer()
    change(tokenizer)
    return tokenizer


def strip(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Strip()


def replace(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Replace(Regex("a+"), "a")


def remove(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()]
    )


def words(tokenizer: Tokenizer) -> None:
    tokenizer.model = models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")


def greedy_token(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True)])


def word_ends(tokenizer: Tokenizer) -> None:
    tokenizer.model = models.BPE(vocab={"a": 0, "a</w>": 1}, merges=[], end_of_word_suffix="</w>")


@pytest.mark.parametrize("change", [strip, replace, remove, words, word_ends, greedy_token])
def test_a_tokenizer_that_drops_text_has_no_bound(change: Callable[[Tokenizer], None]) -> None:
    tokenizer = dropping(change)
    assert token_bound(tokenizer) is None
    assert not TextModel(tokenizer).certainly_exceeds("x" * 100_000, 0)
