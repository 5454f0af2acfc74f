"""What a disturbance of one model does to the requests of others, from the records of two runs. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loadtest.record import Record
from loadtest.slo import Unloaded

_WINDOW_S = 5.0
"""Attainment has recovered when the requests of this many seconds attain the level again."""
_STEP_S = 0.5


@dataclass(frozen=True, slots=True)
class Level:
    """SLO attainment of the requests due in the bucket that begins at ``at_s``."""

    at_s: float
    attained: float


def attained(records: Sequence[Record], unloaded: Mapping[str, Unloaded], scale: float) -> float:
    """Share of the requests within ``scale`` times their unloaded latency; the others are late or failed. 1 of none."""
    met = sum(
        record.is_ok
        and record.e2el_s <= scale * unloaded[record.model or ""].e2el_s(record.num_input, record.num_output)
        for record in records
    )
    return met / len(records) if records else 1.0


def others_kept(
    quiet: Sequence[Record],
    loud: Sequence[Record],
    others: Sequence[str],
    unloaded: Mapping[str, Unloaded],
    scale: float,
) -> float:
    """The smallest ratio, over the models ``others``, of the attainment in the disturbed run to that in the other."""
    ratios = []
    for model in others:
        before = attained([record for record in quiet if record.model == model], unloaded, scale)
        after = attained([record for record in loud if record.model == model], unloaded, scale)
        ratios.append(after / before if before else 1.0)
    return min(ratios)


def buckets(
    records: Sequence[Record], unloaded: Mapping[str, Unloaded], scale: float, end_s: float, width_s: float
) -> list[Level]:
    """The attainment over time. A bucket in which no request was due is left out."""
    levels = []
    for index in range(int(end_s / width_s)):
        due = [r for r in records if index * width_s <= r.scheduled_s < (index + 1) * width_s]
        if due:
            levels.append(Level(index * width_s, attained(due, unloaded, scale)))
    return levels


def recovered_after_s(
    records: Sequence[Record], unloaded: Mapping[str, Unloaded], scale: float, since_s: float, level: float
) -> float:
    """Seconds after ``since_s`` from which on the requests of 5 s attain ``level``; to the last request if they never
    do.
    """
    later = [record for record in records if record.scheduled_s >= since_s]
    last_s = max((record.scheduled_s for record in later), default=since_s)
    start_s = since_s
    while start_s + _WINDOW_S <= last_s:
        due = [record for record in later if start_s <= record.scheduled_s < start_s + _WINDOW_S]
        if due and attained(due, unloaded, scale) >= level:
            return start_s - since_s
        start_s += _STEP_S
    return last_s - since_s


def largest_gap_s(records: Sequence[Record], models: Sequence[str], start_s: float, end_s: float) -> float:
    """The longest time in [start, end) between two messages with tokens of one request of ``models``."""
    gaps = [
        later_s - sooner_s
        for record in records
        if record.model in models
        for (sooner_s, _), (later_s, _) in zip(record.pieces, record.pieces[1:], strict=False)
        if sooner_s < end_s and later_s >= start_s
    ]
    return max(gaps, default=0.0)
