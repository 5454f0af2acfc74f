from collections.abc import Sequence
from itertools import groupby

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from muxmesh.errors import ModelUnsupported
from muxmesh.models.detokenizer import Detokenizer, TokenPieces, special_token_ids
from muxmesh.models.tokenizer import TextModel, byte_tokenizer
from tests.support.tokenizer_kinds import BYTE_TOKENS, TOKENIZERS, words

MODEL = TextModel(byte_tokenizer())
TEXT = st.text(max_size=30)
kinds = pytest.mark.parametrize("kind", TOKENIZERS)
IDS = st.lists(st.integers(0, 35) | st.integers(0, 275) | st.integers(0, 2**32 - 1), max_size=25)


def reference(tokenizer: Tokenizer, token_ids: Sequence[int], skip: bool) -> str:
    """The tokenizer's decode, in which the valid characters of a run of byte tokens stay, as in SentencePiece."""
    if "ByteFallback" not in repr(tokenizer.decoder):
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=skip))
    every = [tokenizer.id_to_token(token_id) for token_id in token_ids]
    kept = [token for token in every if token is not None and not (skip and token in special_token_ids(tokenizer))]
    joined: list[str] = []
    for is_byte, run in groupby(kept, lambda token: token in BYTE_TOKENS):
        tokens = list(run)
        joined += characters(bytes(int(token[3:5], 16) for token in tokens)) if is_byte else tokens
    return str(tokenizer.decoder.decode(joined))


def characters(data: bytes) -> list[str]:
    """The characters of ``data``; a byte that is part of none is U+FFFD."""
    found: list[str] = []
    while data:
        lengths = [n for n in range(1, 5) if is_utf8(data[:n])]
        length = min(lengths, default=1)
        found.append(data[:length].decode(errors="replace"))
        data = data[length:]
    return found


def is_utf8(data: bytes) -> bool:
    return data.decode(errors="ignore").encode() == data


def ends_inside_a_character(pieces: TokenPieces, token_ids: Sequence[int]) -> bool:
    detokenizer = Detokenizer(pieces)
    for token_id in token_ids:
        detokenizer.feed(token_id)
    return detokenizer.flush() != ""


def ids_of(tokenizer: Tokenizer, tokens: Sequence[str]) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


def output(pieces: TokenPieces, token_ids: Sequence[int], prompt: Sequence[int] = ()) -> str:
    detokenizer = Detokenizer(pieces, prompt)
    return "".join([detokenizer.feed(token_id) for token_id in token_ids]) + detokenizer.flush()


@kinds
@given(token_ids=IDS, skip=st.booleans())
def test_the_pieces_of_any_tokens_form_the_whole_text(kind: str, token_ids: list[int], skip: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    assert output(TokenPieces(tokenizer, skip), token_ids) == reference(tokenizer, token_ids, skip)


@kinds
@given(token_ids=IDS, cut=st.integers(0, 25), skip=st.booleans())
def test_an_output_continues_the_text_of_its_prompt_wherever_it_begins(
    kind: str, token_ids: list[int], cut: int, skip: bool
) -> None:
    tokenizer = TOKENIZERS[kind]
    pieces, prompt = TokenPieces(tokenizer, skip), token_ids[:cut]
    assume(not ends_inside_a_character(pieces, prompt))
    text = output(pieces, token_ids[cut:], prompt)
    assert reference(tokenizer, prompt, skip) + text == reference(tokenizer, token_ids, skip)


@kinds
@given(token_ids=IDS)
def test_at_most_three_bytes_are_held_back(kind: str, token_ids: list[int]) -> None:
    detokenizer, sent = Detokenizer(TokenPieces(TOKENIZERS[kind], False)), ""
    for count, token_id in enumerate(token_ids, 1):
        sent += detokenizer.feed(token_id)
        whole = reference(TOKENIZERS[kind], token_ids[:count], False)
        assert whole.startswith(sent) and whole[len(sent) :] in ("", *("\ufffd" * count for count in (1, 2, 3)))


@given(TEXT)
def test_no_piece_of_a_text_contains_part_of_a_character(text: str) -> None:
    detokenizer = MODEL.detokenizer(False)
    pieces = [detokenizer.feed(token) for token in MODEL.encode(text, False)]
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (["<0xC3>", "<0xA9>", "<0xFF>", "▁a"], "é\ufffd a"),
        (["<0xC3>", "▁a"], "\ufffd a"),
        (["<0xE2>", "<0x80>", "▁a"], "\ufffd\ufffd a"),  # as `tokenizers`: one for each byte
        (["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"], "😀"),
        (["▁a", "<0x20>", "<0x41>"], "a A"),
        (["<0x20>", "<0x41>", "▁a"], "A a"),
    ],
)
def test_byte_tokens_become_characters(tokens: list[str], text: str, skip: bool) -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    assert output(TokenPieces(tokenizer, skip), ids_of(tokenizer, tokens)) == text


def test_a_character_of_several_byte_tokens_is_returned_when_it_is_complete() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    detokenizer = Detokenizer(TokenPieces(tokenizer, True))
    tokens = ["<0xC3>", "<0xA9>", "<0xC3>", "<0xA9>"]
    assert [*map(detokenizer.feed, ids_of(tokenizer, tokens))] == ["", "é", "", "é"]


def test_a_skipped_token_inside_a_character_does_not_end_it() -> None:
    first, second = MODEL.encode("é", False)
    assert [*map(MODEL.detokenizer(True).feed, [first, 0, second])] == ["", "", "é"]


class _CountedPieces(TokenPieces):
    """Counts the tokens that the tokenizer's decoder reads."""

    num_decoded = 0

    def text_of(self, tokens: Sequence[str]) -> str:
        self.num_decoded += len(tokens)
        return super().text_of(tokens)


@kinds
@pytest.mark.parametrize("token", ["\ufffd", "ï¿½", "Ã", "<0xC3>", "", "▁", "a", "</w>", "<pad>", "<s>"])
def test_the_work_for_a_token_does_not_grow_with_the_output(kind: str, token: str) -> None:
    tokenizer = TOKENIZERS[kind]
    token_id = tokenizer.token_to_id(token) or 2**31
    pieces = _CountedPieces(tokenizer, True)
    assert len(output(pieces, [token_id] * 3000)) >= 0
    assert pieces.num_decoded <= 3000 * 8


@given(TEXT, TEXT)
@example("Hello world " + "😀" * 5, " sunny")
def test_the_text_of_the_prompt_is_not_returned(prompt: str, text: str) -> None:
    token_ids = MODEL.encode(text, False)
    detokenizer = MODEL.detokenizer(False, MODEL.encode(prompt, False))
    assert "".join(map(detokenizer.feed, token_ids)) + detokenizer.flush() == text


@given(TEXT, st.lists(st.sampled_from(["é", "€", "😀"]), max_size=8), TEXT)
def test_incomplete_characters_of_the_prompt_do_not_appear_in_the_output(
    prompt: str, halves: list[str], text: str
) -> None:
    prompt_ids = MODEL.encode(prompt, False)
    for character in halves:
        prompt_ids += MODEL.encode(character, False)[:-1]
    pieces = MODEL.detokenizer(False, prompt_ids)
    assert "".join(map(pieces.feed, MODEL.encode(text, False))) + pieces.flush() == text


@pytest.mark.parametrize("character", ["é", "€", "😀", "\ufffd"])
@pytest.mark.parametrize("num_first", [1, 2, 3])
def test_a_character_that_begins_in_the_prompt_is_completed_by_the_output(character: str, num_first: int) -> None:
    token_ids = MODEL.encode(character, False)
    prompt, rest = [*MODEL.encode("abc", False), *token_ids[:num_first]], token_ids[num_first:]
    detokenizer = MODEL.detokenizer(False, prompt)
    assert "".join(map(detokenizer.feed, rest)) == (character if rest else "")
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_an_output_that_does_not_complete_the_prompts_character_is_decoded_without_it(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = ids_of(tokenizer, ["ð", "Ł", "a"] if kind == "byte level" else ["<0xF0>", "<0x9F>", "a"])
    pieces = TokenPieces(tokenizer, True)
    assert output(pieces, ids[1:], ids[:1]) == output(pieces, ids[1:]) == "\ufffda"


def test_an_incomplete_character_at_the_end_becomes_a_replacement_character() -> None:
    detokenizer = MODEL.detokenizer(True)
    assert detokenizer.feed(MODEL.encode("é", False)[0]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_an_incomplete_character_of_the_prompt_is_not_part_of_the_output() -> None:
    assert MODEL.detokenizer(True, MODEL.encode("é", False)[:1]).flush() == ""


def test_skipped_special_tokens_have_no_text() -> None:
    assert MODEL.detokenizer(skip_special_tokens=True).feed(0) == ""
    assert MODEL.detokenizer(skip_special_tokens=False).feed(0) == "<|eos|>"


def test_detokenizers_of_one_model_are_independent() -> None:
    first, second = MODEL.encode("é", False)
    one, other = MODEL.detokenizer(False), MODEL.detokenizer(False)
    assert one.feed(first) == other.feed(first) == ""
    assert one.feed(second) == other.feed(second) == "é"


def test_a_decoder_that_cannot_decode_every_text_is_refused() -> None:
    """`tokenizers` panics for a text shorter than what is to be stripped from its end."""
    tokenizer = words(decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]))
    with pytest.raises(ModelUnsupported, match=r"tokenizer\.json: decoder: Strip with `stop` above 0; 0 is supported"):
        TextModel(tokenizer)
