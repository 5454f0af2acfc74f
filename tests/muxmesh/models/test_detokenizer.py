from hypothesis import given
from hypothesis import strategies as st

from muxmesh.models.tokenizer import TextModel, byte_tokenizer

MODEL = TextModel(byte_tokenizer(), None, {})
TEXT = st.text(max_size=30)


@given(st.lists(st.integers(0, 258), max_size=40), st.booleans())
def test_the_pieces_of_any_tokens_form_the_whole_text(token_ids: list[int], skip: bool) -> None:
    detokenizer = MODEL.detokenizer(skip)
    assert "".join(map(detokenizer.feed, token_ids)) + detokenizer.flush() == MODEL.decode(token_ids, skip)


@given(TEXT)
def test_no_piece_of_a_text_contains_part_of_a_character(text: str) -> None:
    detokenizer = MODEL.detokenizer(False)
    pieces = [detokenizer.feed(token) for token in MODEL.encode(text, False)]
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(TEXT, TEXT)
def test_the_text_of_the_prompt_is_not_returned(prompt: str, output: str) -> None:
    detokenizer = MODEL.detokenizer(False, MODEL.encode(prompt, False))
    assert "".join(map(detokenizer.feed, MODEL.encode(output, False))) + detokenizer.flush() == output


def test_a_character_that_begins_in_the_prompt_is_completed_by_the_output() -> None:
    first, second = MODEL.encode("é", False)
    detokenizer = MODEL.detokenizer(False, [*MODEL.encode("abc", False), first])
    assert detokenizer.feed(second) == "é"


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
