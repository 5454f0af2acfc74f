from muxmesh.models.tokenizer import TextModel, byte_tokenizer
from muxmesh.types import Stopping
from router.answer import Answer
from router.stop_strings import StopStrings

TEXT = TextModel(byte_tokenizer(), None, {})
EOS = 0


def tokens(text: str) -> list[int]:
    return TEXT.encode(text, False)


def answer(stops: tuple[str, ...] = (), include: bool = False, text: bool = True, min_new_tokens: int = 0) -> Answer:
    stopping = Stopping(100, min_new_tokens, stop_token_ids=frozenset(tokens("!")), eos_token_ids=frozenset({EOS}))
    return Answer(stopping, TEXT.detokenizer(False) if text else None, StopStrings(stops, include), include)


def test_the_end_of_sequence_has_no_text_unless_it_is_included() -> None:
    assert answer().take([*tokens("hi"), EOS]).text == "hi"
    assert answer(include=True).take([*tokens("hi"), EOS]).text == "hi<|eos|>"


def test_a_stop_token_has_no_text_but_counts() -> None:
    open_answer = answer()
    delta = open_answer.take(tokens("hi!"))
    assert (delta.text, len(delta.token_ids), len(open_answer.token_ids)) == ("hi", 3, 3)


def test_tokens_after_the_one_that_completes_a_stop_string_are_dropped() -> None:
    open_answer = answer(stops=("lo",))
    delta = open_answer.take(tokens("hello there"))
    assert (delta.text, delta.stopped_by) == ("hel", "lo")
    assert open_answer.token_ids == tokens("hello") == list(delta.token_ids)


def test_what_is_held_back_comes_at_the_end() -> None:
    open_answer = answer(stops=("abc",))
    assert open_answer.take(tokens("xab")).text == "x"
    assert open_answer.finish().text == "ab"


def test_half_a_character_at_the_end_is_replaced() -> None:
    open_answer = answer()
    assert open_answer.take(tokens("é")[:1]).text == ""
    assert open_answer.finish().text == "\ufffd"


def test_a_stop_string_is_found_only_after_the_least_length() -> None:
    open_answer = answer(stops=("a",), min_new_tokens=3)
    assert open_answer.take(tokens("aa")).stopped_by is None
    assert open_answer.take(tokens("a")).stopped_by == "a"


def test_without_text_only_tokens_are_counted() -> None:
    open_answer = answer(text=False)
    assert open_answer.take(tokens("hi")).text == open_answer.finish().text == ""
    assert open_answer.token_ids == tokens("hi")
