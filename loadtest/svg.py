"""Line plots as SVG text, without scripts, fonts or external files. Pure.

A page may set the colours: curves and marks have the classes ``s0`` to ``s7``, the grid has ``grid``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT = 560, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 34, 48
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4b5563")
_DASHES = ("", "6 3", "2 3")
_NUM_TICKS = 5
_LEGEND_LINE = 16
_MAX_NAME = 75
"""Characters of a name in the legend, which fill the width."""


@dataclass(frozen=True, slots=True)
class Line:
    """One curve. ``marks``: draws a circle at each point.

    ``is_limit``: a level that curves are compared with, dashed and grey, with its name beside it. Limits are last.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    marks: bool = False
    is_limit: bool = False


def plot(
    title: str, x_label: str, y_label: str, lines: Sequence[Line], log_x: bool = False, log_y: bool = False
) -> str:
    """Returns the plot as an ``<svg>`` element. It omits points that are not finite, or not above 0 on a log axis."""
    cleaned = [_clean(line, log_x, log_y) for line in lines]
    cleaned = [line for line in cleaned if line.xs]
    body = [
        f'<text x="{WIDTH / 2}" y="18" class="title" text-anchor="middle">{escape(title)}</text>',
        f'<text x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text x="4" y="{_TOP - 10}">{escape(y_label)}</text>',
    ]
    num_names = sum(not line.is_limit for line in cleaned) if len(cleaned) > 1 else 0
    if cleaned:
        body += _curves(cleaned, log_x, log_y)
    else:
        body.append(f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">no data</text>')
    height = HEIGHT + _LEGEND_LINE * num_names
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title, quote=True)}">'
        + "".join(body)
        + "</svg>"
    )


def svg_file(svg: str) -> str:
    """The text of a file with a plot, on a white background whatever the page around it has."""
    style = "text{font:11px sans-serif;fill:#1f2937}.title{font-size:13px;font-weight:600}.grid{stroke:#e5e7eb}"
    head, _, rest = svg.partition(">")
    background = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{background}{rest}\n'


def _clean(line: Line, log_x: bool, log_y: bool) -> Line:
    points = [
        (x, y)
        for x, y in zip(line.xs, line.ys, strict=True)
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x) and (y > 0 or not log_y)
    ]
    return replace(line, xs=[x for x, _ in points], ys=[y for _, y in points])


def _curves(lines: Sequence[Line], log_x: bool, log_y: bool) -> list[str]:
    all_x, all_y = [x for line in lines for x in line.xs], [y for line in lines for y in line.ys]
    x_ticks = _log_ticks(all_x) if log_x else _ticks(all_x, from_zero=False)
    y_ticks = _log_ticks(all_y) if log_y else _ticks(all_y, from_zero=True)
    pixel_x = _scale(x_ticks[0], x_ticks[-1], _LEFT, WIDTH - _RIGHT, log_x)
    pixel_y = _scale(y_ticks[0], y_ticks[-1], HEIGHT - _BOTTOM, _TOP, log_y)
    parts = []
    for tick in x_ticks:
        x = pixel_x(tick)
        parts.append(f'<line x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{HEIGHT - _BOTTOM}" class="grid"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_short(tick)}</text>')
    for tick in y_ticks:
        y = pixel_y(tick)
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{WIDTH - _RIGHT}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    for number, line in enumerate(lines):
        colour, dash = COLOURS[number % len(COLOURS)], _DASHES[number // len(COLOURS) % len(_DASHES)]
        if line.is_limit:
            parts += _limit(line, pixel_x, pixel_y)
            continue
        of_series = f"s{number % len(COLOURS)}"
        points = " ".join(f"{pixel_x(x):.1f},{pixel_y(y):.1f}" for x, y in zip(line.xs, line.ys, strict=True))
        parts.append(
            f'<polyline points="{points}" class="{of_series}" fill="none" stroke="{colour}" stroke-width="1.8" '
            f'stroke-dasharray="{dash}">'
            f"<title>{escape(line.name)}</title></polyline>"
        )
        if line.marks:
            parts += [
                f'<circle cx="{pixel_x(x):.1f}" cy="{pixel_y(y):.1f}" r="3.2" class="{of_series}" fill="{colour}">'
                f"<title>{escape(line.name)}: {_short(x)}, {_short(y)}</title></circle>"
                for x, y in zip(line.xs, line.ys, strict=True)
            ]
        if len(lines) > 1:
            y = HEIGHT + 10 + _LEGEND_LINE * number
            parts.append(f'<rect x="4" y="{y - 7}" width="12" height="4" class="{of_series}" fill="{colour}"/>')
            name = line.name if len(line.name) <= _MAX_NAME else f"{line.name[: _MAX_NAME - 3]}..."
            parts.append(f'<text x="22" y="{y}">{escape(name)}</text>')
    return parts


def _limit(line: Line, pixel_x: Callable[[float], float], pixel_y: Callable[[float], float]) -> list[str]:
    """A dashed line with its name above its end."""
    points = " ".join(f"{pixel_x(x):.1f},{pixel_y(y):.1f}" for x, y in zip(line.xs, line.ys, strict=True))
    end_x, end_y = pixel_x(line.xs[-1]), pixel_y(line.ys[-1])
    return [
        f'<polyline points="{points}" class="limit" fill="none" stroke="#6b7280" stroke-dasharray="8 4"/>',
        f'<text x="{end_x:.1f}" y="{end_y - 4:.1f}" text-anchor="end" class="limit">{escape(line.name)}</text>',
    ]


def _scale(low: float, high: float, at_low: float, at_high: float, log: bool) -> Callable[[float], float]:
    def to_pixel(value: float) -> float:
        fraction = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return at_low + fraction * (at_high - at_low)

    return to_pixel


def _ticks(values: Sequence[float], from_zero: bool) -> list[float]:
    """Round numbers that enclose all values, at least two."""
    low = min(values) if not from_zero else min(0.0, *values)
    high = max(values)
    span = high - low or abs(high) or 1.0
    raw = span / _NUM_TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [index * step for index in range(first, last + 1)]


def _log_ticks(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times powers of ten that enclose all values, at least two. A wide range has powers of ten only."""
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    marks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    first = max(index for index, mark in enumerate(marks) if mark <= low * (1 + 1e-9))
    last = max(first + 1, min(index for index, mark in enumerate(marks) if mark >= high * (1 - 1e-9)))
    chosen = marks[first : last + 1]
    return (
        chosen
        if len(chosen) <= 2 * _NUM_TICKS
        else [m for m in chosen if f"{m:e}"[0] == "1" or m in (chosen[0], chosen[-1])]
    )


def _short(value: float) -> str:
    return f"{value:.4g}"
