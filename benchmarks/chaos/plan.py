"""Which fault hits which process when. Pure: a plan is a function of the seed, the table and the names."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.chaos.faults import Fault

_FIRST_AT_S = 1.0
_GAPS_S = ((0.0, 0.1), (0.3, 2.5), (2.5, 7.0), (2.5, 7.0))
"""Least and most seconds between two faults: both at once, one during the recovery of the other, or apart (twice as
often)."""
_SAME_TARGET = 0.25
"""Probability that a fault hits the target of the one before it, if it can."""


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """``at_s``: seconds since the load started. ``hold_s``: seconds until the fault is undone."""

    at_s: float
    fault: str
    target: str
    hold_s: float


def plan_faults(
    rng: random.Random, seconds: float, faults: Sequence[Fault], names: Sequence[str], pace: float = 1.0
) -> Iterator[PlannedFault]:
    """Faults in the order of time, for ``seconds``. ``names``: of all processes; the role is what is before a slash.

    ``pace``: the time between two faults is that many times `_GAPS_S`. All roles of a fault are hit equally often,
    however many processes have them.
    """
    at_s, target = _FIRST_AT_S, ""
    while at_s < seconds:
        (fault,) = rng.choices(faults, [fault.weight for fault in faults])
        role = rng.choice(fault.roles)
        other = rng.choice([name for name in names if role_of(name) == role])
        target = target if rng.random() < _SAME_TARGET and role_of(target) in fault.roles else other
        yield PlannedFault(round(at_s, 2), fault.name, target, round(rng.uniform(*fault.hold_s), 2))
        at_s += pace * rng.uniform(*rng.choice(_GAPS_S))


def role_of(name: str) -> str:
    """The role of a process by its name."""
    return name.split("/", maxsplit=1)[0]


def show_plan(plan: Iterable[PlannedFault]) -> str:
    """A line for each fault."""
    return "\n".join(
        f"{fault.at_s:8.2f} s  {fault.fault:8}  {fault.target}" + (f"  for {fault.hold_s} s" if fault.hold_s else "")
        for fault in plan
    )
