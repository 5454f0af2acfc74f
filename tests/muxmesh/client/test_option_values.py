"""Single values of a request, and whether the wire can carry them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from muxmesh.client.option_values import Unfit, converted, flag, list_of, mapping_of, number, text, whole
from muxmesh.errors import InvalidRequest


@pytest.mark.parametrize(
    ("convert", "value", "sent"),
    [
        (whole(0, 9), 9, 9), (whole(0, 9), np.int64(0), 0), (number, 1, 1.0), (number, np.float32(0.5), 0.5),
        (text, "é", "é"), (flag, False, False), (list_of(text), ("a", "b"), ["a", "b"]),
        (list_of(whole(0, 9)), np.array([1, 2]), [1, 2]), (mapping_of(whole(0, 9), number), {1: 2}, {1: 2.0}),
    ],
)  # fmt: skip
def test_a_value_that_fits_is_converted(convert: Callable[[Any], Any], value: object, sent: object) -> None:
    result = converted("option", convert, value)
    assert result == sent and type(result) is type(sent)


@pytest.mark.parametrize(
    ("convert", "value", "problem"),
    [
        (whole(0, 9), 10, "is 10; a whole number from 0 to 9 is needed"),
        (whole(0, 9), True, "is True; a whole number from 0 to 9 is needed"),
        (whole(0, 9), "1", "is '1'; a whole number from 0 to 9 is needed"),
        (number, "1", "is '1'; a number is needed"),
        (number, 10**400, "a number that a float holds is needed"),
        (text, b"a", "is b'a'; a string is needed"),
        (text, "\ud800", "text that UTF-8 can encode is needed"),
        (flag, 1, "is 1; True or False is needed"),
        (list_of(text), "ab", "is 'ab'; a list is needed"),
        (list_of(whole(0, 9)), [1, 10], "has 10 in it; a whole number from 0 to 9 is needed"),
        (mapping_of(whole(0, 9), number), [1], "is [1]; a dictionary is needed"),
        (mapping_of(whole(0, 9), number), {1: "x"}, "has 'x' in it; a number is needed"),
    ],
)
def test_another_value_is_refused_by_the_name_of_the_option(
    convert: Callable[[Any], Any], value: object, problem: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        converted("option", convert, value)
    assert caught.value.field == "option" and caught.value.problem.endswith(problem)
    with pytest.raises(Unfit):
        convert(value)
