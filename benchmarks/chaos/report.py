"""The result of a run: a table of recovery times, the violations, and one line of counts. Pure."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.chaos.checker import count_kinds
from benchmarks.chaos.history import CANCELLED, COMPLETED, Call, InjectedFault, Violation
from benchmarks.chaos.plan import role_of


def fault_line(fault: InjectedFault) -> str:
    """One line for people: when, what, whom, and how it ended."""
    seconds = fault.ended_at_s - fault.at_s
    outcome = fault.problem or fault.note or f"recovered after {seconds:.1f} s"
    return f"{fault.at_s:7.1f} s  {fault.fault:8}  {fault.target:24}  {outcome}"


def recovery_lines(faults: Iterable[InjectedFault]) -> list[str]:
    """Median and longest recovery by fault and role."""
    seconds: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for fault in faults:
        if not fault.note and math.isfinite(fault.ended_at_s):
            seconds[fault.fault, role_of(fault.target)].append(fault.ended_at_s - fault.at_s)
    return [
        f"{fault:8}  {role:8}  {len(values):3} times, recovered after {statistics.median(values):.1f} s (median), "
        f"{max(values):.1f} s (longest)"
        for (fault, role), values in sorted(seconds.items())
    ]


def counts_line(
    seed: int,
    seconds: float,
    requests: Mapping[str, int],
    calls: Sequence[Call],
    faults: Sequence[InjectedFault],
    violations: Sequence[Violation],
) -> str:
    """The last line. ``requests``: further counts of the load."""
    ends = Counter(call.end for call in calls)
    parts = {
        "requests": requests["requests"],
        "completed": ends.pop(COMPLETED, 0),
        "retried": requests["retried"],
        "cancelled": ends.pop(CANCELLED, 0),
        "past deadline": ends.pop("DeadlineExceeded", 0),
        "restarts": sum(call.num_restarts for call in calls),
        **count_kinds(violations),
        "faults": len(faults),
        **Counter(f"{fault.fault} {role_of(fault.target)}" for fault in faults),
    }
    return f"chaos seed {seed}, {seconds:.0f} s: " + ", ".join(f"{name} {value}" for name, value in parts.items())
