import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.models.tokenizer import TextModel, byte_tokenizer
from muxmesh.types import Candidate, Finish, FinishReason, Stopping, TokenLogprobs
from router.generation import FinishKind, OutputFinish
from router.sequence_output import SequenceOutput
from router.stop_strings import StopStrings

TEXT = TextModel(byte_tokenizer())
EOS = 0
LENGTH = Finish(FinishReason.LENGTH)


def tokens(text: str) -> list[int]:
    return TEXT.encode(text, False)


def output(
    stops: tuple[str, ...] = (), include: bool = False, text: bool = True, min_new_tokens: int = 0
) -> SequenceOutput:
    stopping = Stopping(100, min_new_tokens, stop_token_ids=frozenset(tokens("!")), eos_token_ids=frozenset({EOS}))
    return SequenceOutput(stopping, TEXT.detokenizer(False) if text else None, StopStrings(stops, include), include)


def test_the_end_of_sequence_has_no_text_unless_it_is_included() -> None:
    assert output().append([*tokens("hi"), EOS]).text == "hi"
    assert output(include=True).append([*tokens("hi"), EOS]).text == "hi<|eos|>"


def test_a_stop_token_has_no_text_but_counts() -> None:
    record = output()
    delta = record.append(tokens("hi!"))
    assert (delta.text, len(delta.token_ids), len(record.token_ids)) == ("hi", 3, 3)


def test_tokens_after_the_one_that_completes_a_stop_string_are_dropped() -> None:
    record = output(stops=("lo",))
    delta = record.append(tokens("hello there"))
    assert (delta.text, delta.finish) == ("hel", OutputFinish(FinishKind.STOP_STRING, 5, stop_string="lo"))
    assert record.token_ids == tokens("hello") == list(delta.token_ids)


def test_held_back_text_is_returned_with_the_finish() -> None:
    record = output(stops=("abc",))
    assert record.append(tokens("xab")).text == "x"
    assert record.complete(LENGTH).text == "ab"


def test_an_incomplete_character_at_the_end_is_replaced() -> None:
    record = output()
    assert record.append(tokens("é")[:1]).text == ""
    assert record.complete(LENGTH).text == "\ufffd"


def test_a_stop_string_ends_the_output_only_from_the_least_length_on() -> None:
    record = output(stops=("a",), min_new_tokens=3)
    assert record.append(tokens("aa")).finish is None
    assert record.append(tokens("a")).finish == OutputFinish(FinishKind.STOP_STRING, 3, stop_string="a")


def test_without_a_detokenizer_only_tokens_are_recorded() -> None:
    record = output(text=False)
    assert record.append(tokens("hi")).text == record.complete(LENGTH).text == ""
    assert record.token_ids == tokens("hi")


@pytest.mark.parametrize(
    ("finish", "expected"),
    [
        (Finish(FinishReason.LENGTH), OutputFinish(FinishKind.LENGTH, 2)),
        (Finish(FinishReason.EOS, 0), OutputFinish(FinishKind.EOS, 2, token_id=0)),
        (Finish(FinishReason.STOP_TOKEN, 9), OutputFinish(FinishKind.STOP_TOKEN, 2, token_id=9)),
    ],
)
def test_a_finish_by_token_is_recorded_when_it_is_reported(finish: Finish, expected: OutputFinish) -> None:
    record = output()
    assert record.append(tokens("hi")).finish is None and record.finish is None
    assert record.complete(finish).finish == record.finish == expected


def test_a_stop_string_that_the_last_character_completes_ends_the_output() -> None:
    record = output(stops=("\ufffd",))
    assert record.append(tokens("é")[:1]).finish is None
    delta = record.complete(LENGTH)
    assert (delta.text, delta.finish) == ("", OutputFinish(FinishKind.STOP_STRING, 1, stop_string="\ufffd"))


def test_the_finish_that_the_last_token_causes_is_known_before_it_is_reported() -> None:
    record = output()
    assert record.token_finish is None
    record.append(tokens("hi"))
    assert record.token_finish is None
    record.append([EOS])
    assert record.token_finish == Finish(FinishReason.EOS, EOS)


def test_log_probabilities_of_dropped_tokens_are_dropped() -> None:
    record = output(stops=("lo",))
    logprobs = [TokenLogprobs(Candidate(token, -1.0, 1)) for token in tokens("hello there")]
    assert record.append(tokens("hello there"), logprobs).logprobs == tuple(logprobs[:5])


TEXTS = st.text(alphabet="abé🙂", max_size=12)


@given(TEXTS, st.lists(st.integers(1, 5), max_size=40), st.lists(st.text("abé", min_size=1, max_size=3), max_size=2))
def test_the_text_does_not_depend_on_how_the_tokens_arrive(text: str, sizes: list[int], stops: list[str]) -> None:
    def run(pieces: list[list[int]]) -> tuple[str, list[int], OutputFinish | None]:
        record, sent = output(stops=tuple(stops)), ""
        for piece in pieces:
            sent += record.append(piece).text
            if record.finish is not None:
                return sent, record.token_ids, record.finish
        return sent + record.complete(LENGTH).text, record.token_ids, record.finish

    token_ids, pieces = tokens(text), list[list[int]]()
    for size in sizes:
        pieces.append(token_ids[:size])
        token_ids = token_ids[size:]
    whole = run([tokens(text)])
    assert run([*pieces, token_ids]) == whole == run([[token] for token in tokens(text)])
    assert whole[0] == text or any(stop in text for stop in stops)


def test_the_deltas_of_several_attempts_are_one_output() -> None:
    record = output()
    deltas = [record.append(tokens(part)) for part in ("he", "llo")] + [record.complete(LENGTH)]
    assert [delta.token_ids for delta in deltas] == [tuple(tokens("he")), tuple(tokens("llo")), ()]
    assert "".join(delta.text for delta in deltas) == "hello"
    assert deltas[-1].finish == OutputFinish(FinishKind.LENGTH, 5)


def test_the_token_that_reaches_the_largest_length_has_its_text() -> None:
    stopping = Stopping(2, eos_token_ids=frozenset({EOS}))
    record = SequenceOutput(stopping, TEXT.detokenizer(False))
    assert record.append(tokens("hi")).text == "hi"
    assert record.token_finish == LENGTH


@pytest.mark.parametrize(("include", "text"), [(False, "hi"), (True, "hi!")])
def test_a_stop_token_is_in_the_text_only_if_it_is_included(include: bool, text: str) -> None:
    assert output(include=include).append(tokens("hi!")).text == text


def test_a_stop_token_before_the_least_length_is_plain_text() -> None:
    record = output(min_new_tokens=4)
    assert record.append(tokens("hi!")).text == "hi!"
    assert record.token_finish is None
