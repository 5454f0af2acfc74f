"""How much `benchmarks.alise` measures, and how long that takes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.latency_curve import expected_loads, run_s
from benchmarks.vs_vllm import BATCH_CAP

CAP = 512
MAX_LOAD = 4.0
SETTLE_S = 3.0
"""After a stopped system continues: its connections notice that they were silent, and open again."""
VLLM = "vllm"
_WITHOUT_PREDICTIONS = ("fcfs", "no prediction", VLLM)


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured. ``loads``: of the first runs of each system, which has ``num_points`` rates.

    ``num_repeats``: runs of our systems at each of ``loads``, of which a point is the mean. ``arrivals_s``: of each
    run. ``num_first``: requests at once before. ``within_s``: no rate is measured that is expected to end later than
    that many seconds after the start; None is no limit.
    """

    loads: Sequence[float]
    num_points: int
    arrivals_s: float
    num_first: int
    within_s: float | None = None
    num_repeats: int = 1

    def num_at_once(self, name: str) -> int:
        """Requests at once for a system. Those that predict learn from them; for the others half of them are enough."""
        return max(2 * BATCH_CAP, self.num_first // 2) if name in _WITHOUT_PREDICTIONS else self.num_first

    def repeats_of(self, name: str, turn: int) -> int:
        """Runs of a system at its rate number ``turn``."""
        return self.num_repeats if name != VLLM and turn < len(self.loads) else 1


@dataclass(frozen=True, slots=True)
class Speed:
    """Of a system: requests per second that it sustains, and their mean output tokens."""

    requests_per_s: float
    mean_tokens: float

    def run_s(self, load: float, arrivals_s: float) -> float:
        """Expected seconds of a run."""
        return SETTLE_S + run_s(load, arrivals_s, self.requests_per_s, self.mean_tokens, CAP, BATCH_CAP)

    def all_runs_s(self, name: str, effort: Effort) -> float:
        """Expected seconds of all runs of a system, in the longest case: a curve that never exceeds the level."""
        loads = expected_loads(effort.loads, effort.num_points, MAX_LOAD)
        return sum(
            effort.repeats_of(name, turn) * self.run_s(load, effort.arrivals_s) for turn, load in enumerate(loads)
        )


_OURS, _VLLMS = (Speed(1.0, 145), 10.0), (Speed(0.6, 145), 150.0)
"""On two cores, before anything is measured; and the seconds until a system serves."""


def expected_s(names: Sequence[str], effort: Effort) -> float:
    """Seconds of the whole benchmark with the systems ``names``, in the longest case."""
    total_s = 0.0
    for name in names:
        speed, start_s = _VLLMS if name == VLLM else _OURS
        at_once_s = speed.run_s(1.0, effort.num_at_once(name) / speed.requests_per_s)
        total_s += start_s + at_once_s + speed.all_runs_s(name, effort)
    return total_s
