import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.stop_strings import StopStrings

TEXT = st.text(alphabet="abc", max_size=20)
PIECES = st.lists(st.text(alphabet="abc", max_size=3), max_size=15)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3)


def run(pieces: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    """The whole text that is sent, and the stop string that ended it."""
    matcher, text = StopStrings(stops, include), ""
    for piece in pieces:
        sent = matcher.feed(piece)
        text += sent.text
        if sent.stopped_by is not None:
            return text, sent.stopped_by
    return text + matcher.flush(), None


@given(PIECES, STOPS, st.booleans())
def test_the_result_does_not_depend_on_how_the_text_is_divided(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    whole = ""
    for piece in pieces:  # the output ends with the first piece that completes a stop string
        whole += piece
        if any(stop in whole for stop in stops):
            break
    found = [(whole.find(stop), -len(stop), stop) for stop in stops if stop in whole]
    if not found:
        assert run(pieces, stops, include) == (whole, None)
        return
    at, _, stop = min(found)
    assert run(pieces, stops, include) == (whole[: at + len(stop) * include], stop)


@given(PIECES, STOPS)
def test_only_the_beginning_of_a_stop_string_is_held_back(pieces: list[str], stops: list[str]) -> None:
    matcher, sent, whole = StopStrings(stops, False), "", ""
    for piece in pieces:
        whole += piece
        if any(stop in whole for stop in stops):
            return
        sent += matcher.feed(piece).text
        ends = [whole[at:] for at in range(len(whole)) if any(stop.startswith(whole[at:]) for stop in stops)]
        assert sent + max(ends, key=len, default="") == whole


@given(PIECES, STOPS)
def test_no_part_of_a_stop_string_is_sent(pieces: list[str], stops: list[str]) -> None:
    matcher, sent = StopStrings(stops, False), ""
    for piece in pieces:
        filtered = matcher.feed(piece)
        sent += filtered.text
        if filtered.stopped_by:
            break
    assert not any(stop in sent for stop in stops)


def test_a_stop_string_across_three_pieces_is_found() -> None:
    assert run(["Hello\n", "Use", "r:", " hi"], ["\nUser:"], False) == ("Hello", "\nUser:")


def test_a_stop_string_that_is_completed_once_the_output_may_end_is_found() -> None:
    matcher = StopStrings(["END"], False)
    assert matcher.feed("xE", may_stop=False).text == "x"
    assert matcher.feed("ND more").stopped_by == "END"


def test_a_stop_string_is_plain_text_until_the_output_may_end() -> None:
    matcher = StopStrings(["b"], False)
    assert matcher.feed("abc", may_stop=False).text == "abc"
    assert matcher.feed("ab").stopped_by == "b"


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopStrings([], False).feed("abc").text == "abc"


@pytest.mark.parametrize(
    ("stops", "found"),
    [(["bc", "ab"], "ab"), (["ab", "abc"], "abc"), (["abc", "ab"], "abc"), (["c", "bcd"], "bcd"), (["abd"], None)],
)
def test_the_stop_string_that_begins_first_ends_the_output_and_of_several_the_longest(
    stops: list[str], found: str | None
) -> None:
    assert StopStrings(stops, False).feed("xabcd").stopped_by == found


def test_a_complete_stop_string_does_not_wait_for_a_longer_one() -> None:
    matcher = StopStrings(["ab", "abc"], False)
    assert matcher.feed("xa").text == "x"
    assert matcher.feed("b").stopped_by == "ab"


def test_held_back_text_is_flushed_once() -> None:
    matcher = StopStrings(["abc"], False)
    assert matcher.feed("xab").text == "x"
    assert (matcher.flush(), matcher.flush()) == ("ab", "")


@pytest.mark.parametrize(("include", "text"), [(False, "x"), (True, "xab")])
def test_text_after_a_stop_string_is_dropped(include: bool, text: str) -> None:
    assert StopStrings(["ab"], include).feed("xaby").text == text


def test_a_stop_string_that_was_complete_before_the_output_may_end_does_not_end_it_later() -> None:
    matcher = StopStrings(["ab", "abc"], False)
    assert matcher.feed("ab", may_stop=False).text == ""
    assert matcher.feed("x").text == "abx"


@given(st.lists(st.text(alphabet="ab", min_size=1, max_size=9), min_size=1, max_size=9), st.text("ab", max_size=60))
def test_strings_that_overlap_are_found_where_they_begin_first(stops: list[str], text: str) -> None:
    whole, found = run(list(text), stops, False)
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert (whole, found) == (text, None)
        return
    stop = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
    assert (whole, found) == (text[: ends[0] - len(stop)], stop)


def test_long_and_many_stop_strings_are_found_after_a_long_near_miss() -> None:
    stops = ["a" * length + "b" for length in range(1000, 1023)]
    text, found = run(["a" * 7] * 1000 + ["c"] + ["a"] * 1005 + ["b"], stops, False)
    assert found == "a" * 1005 + "b"
    assert text == "a" * 7000 + "c"
