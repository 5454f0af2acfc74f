"""Each field of a model's file is checked as it is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muxmesh.errors import ModelUnsupported
from muxmesh.models.file_fields import FileFields

ORIGIN = Path("m/config.json")


def fields(value: object) -> FileFields:
    return FileFields(ORIGIN, {"a": value}, "outer.")


READERS: dict[str, Callable[[FileFields], Any]] = {
    "integer": lambda one: one.integer("a", 1, 9),
    "integers": lambda one: one.integers("a", 1, 9),
    "number": lambda one: one.number("a", 0.0, 9.0),
    "number or equal": lambda one: one.number("a", 0.0, 9.0, or_equal=True),
    "flag": lambda one: one.flag("a", default=True),
    "text": lambda one: one.text("a"),
}


@pytest.mark.parametrize(
    ("reader", "value", "found"),
    [
        ("integer", 1, 1), ("integer", 9, 9), ("integers", 3, (3,)), ("integers", [9, 1], (9, 1)), ("integers", [], ()),
        ("number", 9, 9.0), ("number", 1e-300, 1e-300), ("number or equal", 0, 0.0), ("number or equal", 9.0, 9.0),
        ("flag", False, False), ("text", "", ""),
    ],
)  # fmt: skip
def test_a_value_in_range_is_returned(reader: str, value: object, found: object) -> None:
    assert READERS[reader](fields(value)) == found


@pytest.mark.parametrize("reader", READERS)
def test_a_null_and_a_missing_field_are_the_same(reader: str) -> None:
    expected = True if reader == "flag" else None
    assert READERS[reader](fields(None)) == READERS[reader](FileFields(ORIGIN, {})) == expected


@pytest.mark.parametrize(
    ("reader", "value", "problem"),
    [
        ("integer", 0, "is 0; from 1 to 9 is needed"),
        ("integer", 10**40, f"is {10**40}; from 1 to 9 is needed"),
        ("integer", True, "is true; must be a whole number"),
        ("integer", 1.0, "must be a whole number"),
        ("integer", "1", "must be a whole number"),
        ("integer", [1], "is a list; must be a whole number"),
        ("integer", {}, "is an object; must be a whole number"),
        ("integers", [1, None], "has a null among its numbers"),
        ("integers", [1, "2"], "is '2'; must be a whole number"),
        ("number", 0, "is 0; above 0 and at most 9 is needed"),
        ("number or equal", -1e-300, "is -1e-300; at least 0 and at most 9 is needed"),
        *(("number or equal", value, "at most 9 is needed") for value in (float("nan"), float("inf"), 9.1)),
        *(("number", value, "must be a number") for value in (True, "1", [1.0])),
        *(("flag", value, "must be true or false") for value in (0, 1, "true")),
        ("text", 3, "is 3; must be a string"),
    ],
)
def test_any_other_value_is_refused_with_the_file_and_the_path_of_the_field(
    reader: str, value: object, problem: str
) -> None:
    with pytest.raises(ModelUnsupported) as caught:
        READERS[reader](fields(value))
    assert str(caught.value).startswith(f"{ORIGIN}: outer.a: is " if "null" not in problem else f"{ORIGIN}: outer.a: ")
    assert str(caught.value).endswith(problem)


@pytest.mark.parametrize("read", [FileFields.needed_integer, FileFields.needed_number])
def test_a_needed_field_is_reported_if_it_is_missing(read: Callable[..., object]) -> None:
    with pytest.raises(ModelUnsupported, match=r"config\.json: outer\.b: is missing"):
        read(fields(1), "b", 0, 1)


def test_the_fields_of_an_inner_object_have_its_path() -> None:
    inner = fields({"b": "x"}).inner("a")
    with pytest.raises(ModelUnsupported, match=r"outer\.a\.b: is 'x'; must be a whole number"):
        inner.integer("b", 0, 1)
    assert fields(None).inner("a").values == {}
    with pytest.raises(ModelUnsupported, match=r"outer\.a: is a list; must be an object"):
        fields([1]).inner("a")
