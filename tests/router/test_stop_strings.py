from hypothesis import given
from hypothesis import strategies as st

from router.stop_strings import StopStrings

TEXT = st.text(alphabet="abc", max_size=20)
PIECES = st.lists(st.text(alphabet="abc", max_size=3), max_size=15)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3)


def run(pieces: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    matcher, text = StopStrings(stops, include), ""
    for piece in pieces:
        passed = matcher.feed(piece)
        text += passed.text
        if passed.stopped_by is not None:
            return text, passed.stopped_by
    return text + matcher.flush(), None


@given(PIECES, STOPS, st.booleans())
def test_pieces_give_what_the_whole_text_gives(pieces: list[str], stops: list[str], include: bool) -> None:
    whole = ""
    for piece in pieces:  # the answer ends with the first piece that completes a stop string
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
def test_no_more_is_held_back_than_what_begins_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    matcher, sent, whole = StopStrings(stops, False), "", ""
    for piece in pieces:
        whole += piece
        if any(stop in whole for stop in stops):
            return
        sent += matcher.feed(piece).text
        ends = [whole[at:] for at in range(len(whole)) if any(stop.startswith(whole[at:]) for stop in stops)]
        assert sent + max(ends, key=len, default="") == whole


@given(PIECES, STOPS)
def test_nothing_is_sent_that_a_stop_string_would_cut(pieces: list[str], stops: list[str]) -> None:
    matcher, sent = StopStrings(stops, False), ""
    for piece in pieces:
        passed = matcher.feed(piece)
        sent += passed.text
        if passed.stopped_by:
            break
    assert not any(stop in sent for stop in stops)


def test_a_stop_string_across_three_pieces_is_found() -> None:
    assert run(["Hello\n", "Use", "r:", " hi"], ["\nUser:"], False) == ("Hello", "\nUser:")


def test_a_stop_string_that_begins_before_it_may_stop_and_ends_after_is_found() -> None:
    matcher = StopStrings(["END"], False)
    assert matcher.feed("xE", may_stop=False).text == "x"
    assert matcher.feed("ND more").stopped_by == "END"


def test_nothing_stops_before_it_may() -> None:
    matcher = StopStrings(["b"], False)
    assert matcher.feed("abc", may_stop=False).text == "abc"
    assert matcher.feed("ab").stopped_by == "b"


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopStrings([], False).feed("abc").text == "abc"
