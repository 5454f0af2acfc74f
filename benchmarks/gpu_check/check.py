"""What one check is and what it finds: plain values, and the file in which a check's process leaves its findings."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Use = Literal["beside", "mps", "alone"]
"""What a check may run beside: `beside` others, beside others but no second one that starts an MPS daemon (`mps`), or
`alone` because it measures time."""
State = Literal["passed", "failed", "timed out", "not run"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table.

    ``limit_s``: after it, the check's processes are killed. ``tests``: arguments for pytest; without them the check is
    the function of its name in `benchmarks.gpu_check.checks`. ``environment``: variables of its process.
    """

    name: str
    expected: str
    limit_s: float
    use: Use
    tests: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    workers: int = 0
    """Processes among which pytest divides the tests, where it can; 0: it does not."""


@dataclass(slots=True)
class Findings:
    """What a check measured (``figures``) and compared. Written to ``path`` after each, so a killed check has some."""

    path: Path | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    comparisons: list[dict[str, Any]] = field(default_factory=list)

    def figure(self, name: str, value: Any) -> None:
        """Records a figure that is not judged."""
        self.figures[name] = value
        self._write()

    def expect(self, what: str, holds: bool, value: Any = None) -> None:
        """Records a comparison: the check fails if it does not hold, and goes on."""
        self.comparisons.append({"what": what, "holds": bool(holds), "value": value})
        print(f"{'ok' if holds else 'FAILED':8}{what}: {value}", flush=True)
        self._write()

    def aim(self, what: str, holds: bool, value: Any = None) -> None:
        """Records whether an aim is reached. The check passes either way."""
        self.comparisons.append({"what": what, "holds": bool(holds), "value": value, "is_aim": True})
        print(f"{'reached' if holds else 'NOT':8}{what}: {value}", flush=True)
        self._write()

    @property
    def hold(self) -> bool:
        """True if something was compared and every comparison that is not an aim holds."""
        judged = [one for one in self.comparisons if not one.get("is_aim")]
        return bool(self.comparisons) and all(one["holds"] for one in judged)

    def _write(self) -> None:
        if self.path is not None:
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps({"figures": self.figures, "comparisons": self.comparisons}, default=str))
            partial.replace(self.path)


@dataclass(slots=True)
class Result:
    """The outcome of one check. ``output``: the end of what a check that failed printed."""

    name: str
    expected: str
    state: State
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    output: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def startable(waiting: list[Check], running: list[Check], most: int) -> list[Check]:
    """Returns the checks that may start now, in the order of ``waiting``, of which none overtakes one that runs alone.

    At most ``most`` run at once.
    """
    started: list[Check] = []
    for check in waiting:
        now = [*running, *started]
        if any(one.use == "alone" for one in now) or len(now) >= most:
            break
        if check.use == "alone":
            if not now:
                started.append(check)
            break
        if check.use == "mps" and any(one.use == "mps" for one in now):
            continue
        started.append(check)
    return started
