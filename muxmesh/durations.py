"""Durations as text for people: `41 ms`, `2.3 s`, `30 min`. Programs get seconds."""

from __future__ import annotations

_UNITS = ((1e-3, "ms", 1000), (1.0, "s", 120), (60.0, "min", 120), (3600.0, "h", 48), (86400.0, "d", float("inf")))
"""Seconds of a unit, its symbol, and from how many of it on the next unit is used."""


def duration_text(seconds: float) -> str:
    """``seconds`` (at least 0, finite) in the unit that fits: two digits, or the whole number. `0 s` below 50 µs."""
    if seconds < 5e-5:
        return "0 s"
    for unit_s, symbol, limit in _UNITS:
        count = seconds / unit_s
        rounded = round(count, 1) if count < 9.95 else round(count)
        if rounded < limit:
            return f"{rounded} {symbol}".replace(".0 ", " ")
    raise ValueError(f"{seconds} is no duration")
