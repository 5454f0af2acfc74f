import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.svg import HEIGHT, WIDTH, Line, plot, svg_file

FINITE = st.floats(-1e9, 1e9).map(lambda value: round(value, 3))
POINTS = st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=6)


def elements(svg: str, name: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter(name))


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in elements(svg, "text")]


def x_ticks(svg: str) -> list[float]:
    return [
        float(element.text or "") for element in elements(svg, "text")
        if element.get("y") == f"{HEIGHT - 48 + 16}" and element.get("text-anchor") == "middle"
    ]  # fmt: skip


def curve(svg: str, index: int = 0) -> list[tuple[float, float]]:
    """The points of a curve, in pixels."""
    pairs = (elements(svg, "polyline")[index].get("points") or "").split()
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in pairs)]


def test_odd_values_give_a_well_formed_plot() -> None:
    odd = [
        Line("flat", [1, 2, 3], [5, 5, 5]),
        Line("point", [2], [0]),
        Line("none", [], []),
        Line("bad", [1], [float("nan")]),
    ]
    for log_x in (False, True):
        ElementTree.fromstring(plot("t <&>", "x", "y", odd, log_x))
    ElementTree.fromstring(plot("t", "x", "y", []))
    ElementTree.fromstring(plot("t", "x", "y", [Line("wide", [1e-6, 1, 1e9], [0, -4, 1e12])], True))


@given(st.lists(POINTS, min_size=1, max_size=3), st.booleans())
def test_every_point_is_inside_the_frame(lines: list[list[tuple[float, float]]], log_x: bool) -> None:
    drawn = [
        Line(f"line {index}", [abs(x) + 0.001 if log_x else x for x, _ in points], [y for _, y in points])
        for index, points in enumerate(lines)
    ]
    svg = plot("t", "x", "y", drawn, log_x)
    for index, points in enumerate(lines):
        placed = curve(svg, index)
        assert len(placed) == len(points)
        assert all(64 <= x <= WIDTH - 14 and 34 <= y <= HEIGHT - 48 for x, y in placed)


@given(st.lists(st.floats(0.001, 1e6), min_size=2, max_size=2, unique=True), st.booleans())
def test_larger_values_are_further_right_and_higher(values: list[float], log_x: bool) -> None:
    low, high = sorted(values)
    (low_x, low_y), (high_x, high_y) = curve(plot("t", "x", "y", [Line("l", [low, high], [low, high])], log_x))
    assert low_x <= high_x
    assert low_y >= high_y
    if high > 1.01 * low:
        assert low_x < high_x


@given(st.floats(0.001, 1e6), st.floats(1.1, 100))
def test_on_a_log_y_axis_equal_ratios_are_equal_distances(low: float, factor: float) -> None:
    line = Line("l", [1, 2, 3], [low, low * factor, low * factor**2])
    first, second, third = (y for _, y in curve(plot("t", "x", "y", [line], log_y=True)))
    assert first - second == pytest.approx(second - third, abs=0.21)
    assert 34 <= third < second < first <= HEIGHT - 48


def test_a_file_is_the_plot_on_white_with_dashed_limits_that_have_their_names_beside_them() -> None:
    lines = [Line("curve", [1, 2], [1, 2]), Line("limit", [1, 2], [1.5, 1.5], is_limit=True)]
    text = svg_file(plot("t", "x", "y", lines))
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    curves = root.findall("{*}polyline")
    assert [bool(one.get("stroke-dasharray")) for one in curves] == [False, True]
    (name,) = (one for one in root.findall("{*}text") if one.text == "limit")
    assert 34 <= float(name.get("y") or 0) <= HEIGHT - 48


@given(st.floats(0.01, 1e5), st.floats(1.01, 1e4))
def test_ticks_are_few_and_enclose_the_values(low: float, factor: float) -> None:
    for log_x in (False, True):
        ticks = x_ticks(plot("t", "x", "y", [Line("l", [low, low * factor], [1, 2])], log_x))
        assert 2 <= len(ticks) <= 12
        assert ticks[0] <= low * 1.001
        assert ticks[-1] >= low * factor * 0.999
        assert all(later > sooner for sooner, later in itertools.pairwise(ticks)), "labels differ"


@pytest.mark.parametrize(
    ("xs", "log_x", "ticks"),
    [
        ([0, 10], False, [0, 2, 4, 6, 8, 10]),
        ([3, 47], False, [0, 10, 20, 30, 40, 50]),
        ([5, 5], False, [5, 6]),
        ([100_000, 500_000], False, [1e5, 2e5, 3e5, 4e5, 5e5]),
        ([0, 600_000], False, [0, 2e5, 4e5, 6e5]),
        ([0, 0.0006], False, [0, 0.0002, 0.0004, 0.0006]),
        ([1, 10], True, [1, 2, 5, 10]),
        ([3, 30], True, [2, 5, 10, 20, 50]),
        ([1, 1], True, [1, 2]),
        ([2, 3e6], True, [2, 10, 100, 1000, 10000, 1e5, 1e6, 5e6]),
    ],
)
def test_ticks_are_round_numbers(xs: list[float], log_x: bool, ticks: list[float]) -> None:
    assert x_ticks(plot("t", "x", "y", [Line("l", xs, [1, 2])], log_x)) == ticks


def test_the_y_axis_starts_at_zero() -> None:
    svg = plot("t", "x", "y", [Line("l", [1, 2], [100, 101])])
    assert "0" in [element.text for element in elements(svg, "text") if element.get("text-anchor") == "end"]
    assert min(y for _, y in curve(svg)) < HEIGHT / 3, "values far from 0 are far from the axis"


@pytest.mark.parametrize(
    ("bad", "log_x"),
    [
        ((math.nan, 1), False),
        ((1, math.nan), False),
        ((math.inf, 1), False),
        ((1, -math.inf), True),
        ((0, 1), True),
        ((-1, 1), True),
    ],
)
def test_points_that_cannot_be_drawn_are_omitted(bad: tuple[float, float], log_x: bool) -> None:
    svg = plot("t", "x", "y", [Line("l", [1, bad[0], 3], [1, bad[1], 3])], log_x)
    assert len(curve(svg)) == 2


def test_zero_and_negative_values_are_drawn_on_a_linear_axis() -> None:
    assert len(curve(plot("t", "x", "y", [Line("l", [0, -1], [0, -1])]))) == 2


@pytest.mark.parametrize("lines", [[], [Line("l", [], [])], [Line("l", [math.nan], [1])]])
def test_a_plot_without_points_has_no_data(lines: list[Line]) -> None:
    svg = plot("t", "x", "y", lines)
    assert "no data" in texts(svg)
    assert not elements(svg, "polyline")


def test_marks_are_circles_with_their_values() -> None:
    svg = plot("t", "x", "y", [Line("l", [1, 2.5], [3, 123456])])
    assert not elements(svg, "circle")
    marked = plot("t", "x", "y", [Line("l", [1, 2.5], [3, 123456], marks=True)])
    assert re.findall(r"<title>(l: .*?)</title>", marked) == ["l: 1, 3", "l: 2.5, 1.235e+05"]


def test_a_legend_is_shown_for_several_lines_only() -> None:
    one, other = Line("first", [1], [1]), Line("second", [1], [2])
    assert "first" not in texts(plot("t", "x", "y", [one]))
    both = plot("t", "x", "y", [one, other])
    assert {"first", "second"} <= set(texts(both))
    assert len(elements(both, "rect")) == 2


def test_lines_differ_in_colour_or_dash() -> None:
    lines = [Line(str(index), [1, 2], [index, index]) for index in range(20)]
    styles = {
        (element.get("stroke"), element.get("stroke-dasharray"))
        for element in elements(plot("t", "x", "y", lines), "polyline")
    }
    assert len(styles) == 20


def test_labels_and_names_are_escaped() -> None:
    text = "<script>&\"'"
    svg = plot(text, text, text, [Line(text, [1], [1], marks=True), Line(text, [2], [2])])
    assert "<script>" not in svg
    assert texts(svg).count(text) == 3 + 2
    assert ElementTree.fromstring(svg).get("aria-label") == text


def test_values_and_positions_of_a_line_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="shorter"):
        plot("t", "x", "y", [Line("l", [1, 2], [1])])
