"""Checks of single values of a request: whether the wire can carry them. Knows no options and no messages.

Each check takes any object and returns the value to send. It raises `Unfit` with the values that are possible, which
`converted` makes an error with a name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

from muxmesh.errors import InvalidRequest
from muxmesh.quoting import quoted

MAX_UINT32 = (1 << 32) - 1


class Unfit(ValueError):
    """A value cannot be sent. The message says what can, ``part`` which part of the value is meant."""

    def __init__(self, needed: str, part: str | None = None) -> None:
        super().__init__(needed)
        self.part = part

    def problem(self, value: object) -> str:
        """The problem with ``value`` in one line."""
        return f"{self.part or f'is {quoted(value)}'}; {self}"


Convert = Callable[[Any], Any]


def converted(name: str, convert: Convert, value: object) -> Any:
    """The value to send. Raises InvalidRequest, which names the option or the part of it."""
    try:
        return convert(value)
    except Unfit as error:
        raise InvalidRequest(name, error.problem(value)) from None


def whole(least: int, most: int) -> Convert:
    """Whole numbers from ``least`` to ``most``, those of numpy included."""

    def convert(value: Any) -> int:
        try:
            number = operator.index(value)
        except TypeError:
            number = None
        if number is None or isinstance(value, bool) or not least <= number <= most:
            raise Unfit(f"a whole number from {least} to {most} is needed")
        return number

    return convert


def number(value: Any) -> float:
    """Any real number that a float holds. Whether it is in range is for the router to report."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise Unfit("a number is needed")
    try:
        return float(value)
    except OverflowError:
        raise Unfit("a number that a float holds is needed") from None


def text(value: Any) -> str:
    """A string that UTF-8 can encode."""
    if not isinstance(value, str):
        raise Unfit("a string is needed")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unfit("text that UTF-8 can encode is needed") from None
    return value


def flag(value: Any) -> bool:
    """True or False, and no number."""
    if not isinstance(value, bool):
        raise Unfit("True or False is needed")
    return value


def elements(value: object) -> list[Any] | None:
    """The elements of a collection or an array; None if ``value`` has none, as an array without dimensions."""
    try:
        return list(value) if isinstance(value, Iterable) else None
    except TypeError:
        return None


def list_of(convert: Convert) -> Convert:
    """Lists of what ``convert`` accepts."""

    def convert_all(value: Any) -> list[Any]:
        if isinstance(value, str | bytes | Mapping) or (parts := elements(value)) is None:
            raise Unfit("a list is needed")
        return [_element(convert, part) for part in parts]

    return convert_all


def mapping_of(convert_key: Convert, convert_value: Convert) -> Convert:
    """Dictionaries of what the two accept."""

    def convert_all(value: Any) -> dict[Any, Any]:
        if not isinstance(value, Mapping):
            raise Unfit("a dictionary is needed")
        return {_element(convert_key, key): _element(convert_value, part) for key, part in value.items()}

    return convert_all


def _element(convert: Convert, part: object) -> Any:
    try:
        return convert(part)
    except Unfit as error:
        raise Unfit(str(error), f"has {quoted(part)} in it") from None
