import io
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.quoting import MAX_QUOTED, OneLineFormatter, cut_to_bytes, named, one_line, quoted

ANYTHING = st.recursive(
    st.text() | st.binary() | st.integers() | st.floats() | st.none(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


@given(ANYTHING)
def test_any_value_is_quoted_in_one_printable_line_of_a_bounded_length(value: object) -> None:
    shown = quoted(value)
    assert shown.isprintable()
    assert len(shown) <= MAX_QUOTED + len("...")


@given(st.text(max_size=9))
def test_a_short_text_is_quoted_as_python_would_write_it(text: str) -> None:
    assert quoted(text) == repr(text)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("m" * 8000, "'" + "m" * 99 + "..."),
        ("a\nERROR b\x1b[31m", r"'a\nERROR b\x1b[31m'"),
        ("\ud800\u202e", r"'\ud800\u202e'"),
        (b"\x00" * 500, "b'" + r"\x00" * 24 + r"\x" + "..."),
        (12, "12"),
        (True, "True"),
        ([1, "a"], "[1, 'a']"),
        ({"a": None}, "{'a': None}"),
    ],
)
def test_what_is_shown_of_a_value(value: object, shown: str) -> None:
    assert quoted(value) == shown


def test_a_value_that_contains_itself_many_times_is_quoted_at_once() -> None:
    value: list[object] = ["x"]
    for _ in range(200):
        value = [value, value]
    assert len(quoted(value)) <= MAX_QUOTED + len("...")


@given(st.text())
def test_a_name_has_no_quotation_marks_of_its_own_and_the_same_bounds(name: str) -> None:
    shown = named(name)
    assert shown.isprintable() and len(shown) <= MAX_QUOTED + len("...")
    assert shown == name or not name.isprintable() or len(name) > MAX_QUOTED


@given(st.text(), st.integers(10, 300))
def test_a_text_is_cut_to_bytes_between_characters(text: str, num_bytes: int) -> None:
    shown = cut_to_bytes(text, num_bytes)
    assert len(shown.encode()) <= num_bytes
    assert shown == one_line(text) or (shown.endswith("...") and one_line(text).startswith(shown[:-3]))


def test_a_log_message_stays_one_line_whatever_it_contains() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(OneLineFormatter("%(levelname)s %(message)s"))
    record = logging.LogRecord("x", logging.INFO, "", 0, "from %s", ("a\nCRITICAL forged",), None)
    handler.handle(record)
    assert stream.getvalue() == "INFO from a\\nCRITICAL forged\n"


def test_a_number_of_too_many_digits_is_described() -> None:
    assert quoted([1 << 20_000]) == "[an integer of 20001 bits]"
