"""A quantile bound on prediction errors that holds for any distribution of errors. Pure.

Rolling split-conformal prediction (Vovk et al. 2005): the bound is an empirical quantile of the latest scores. Scores
drift, so the level of that quantile is adapted to the recent miss rate (adaptive conformal inference, Gibbs and Candès
2021).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

FIRST_BOUND = 1.6
"""The 0.9 quantile of the scores before any is known, approximately."""
_WINDOW = 512
_STEP = 0.005
_MAX_LEVEL_SHIFT, _MAX_LEVEL = 0.4, 0.995
_SOLVE_EVERY = 8


class ConformalBound:
    """Owns the latest scores. A score is an error over its predicted spread, positive if the prediction was too short.

    ``bound`` is at least as large as a share of ``level`` of the scores to come.
    """

    def __init__(self, level: float = 0.9, first_bound: float = FIRST_BOUND) -> None:
        """``first_bound`` is used until there are enough scores."""
        self.bound = self._first_bound = first_bound
        self._target = level
        self._level = level
        """Level of the empirical quantile: the target, adapted to the recent miss rate."""
        self._scores: deque[float] = deque(maxlen=_WINDOW)
        self._since_solved = 0

    def observe(self, score: float, bound: float) -> None:
        """Adds a score. ``bound`` is the one that was in use when its prediction was made."""
        missed = score > bound
        level = self._level + _STEP * (missed - (1 - self._target))
        self._level = min(_MAX_LEVEL, self._target + _MAX_LEVEL_SHIFT, max(self._target - _MAX_LEVEL_SHIFT, level))
        self._scores.append(score)
        self._since_solved += 1
        if self._since_solved >= _SOLVE_EVERY:
            self._since_solved = 0
            self.bound = _conformal_quantile(self._scores, self._level, self.bound)

    @property
    def scores(self) -> list[float]:
        """The latest scores, oldest first."""
        return list(self._scores)

    def dump(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {
            "bound": self.bound,
            "level": self._level,
            "scores": self.scores,
            "since_solved": self._since_solved,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Replaces the state by what `dump` returned. Raises ValueError, KeyError or TypeError for another value."""
        bound, level, *scores = (float(one) for one in (state["bound"], state["level"], *state["scores"]))
        if not all(map(math.isfinite, (bound, level, *scores))) or not 0 < level < 1:
            raise ValueError(f"a bound is finite, and so are its scores, not {state}")
        if len(scores) < _SOLVE_EVERY and bound != self._first_bound:
            raise ValueError(f"a bound needs {_SOLVE_EVERY} scores, not {len(scores)}")
        self.bound, self._level, self._since_solved = bound, level, int(state["since_solved"])
        self._scores.clear()
        self._scores.extend(scores)


def _conformal_quantile(scores: Iterable[float], level: float, default: float) -> float:
    """The ``ceil((n + 1) * level)``-th smallest of n scores; ``default`` if n is too small for that."""
    ordered = sorted(scores)
    rank = math.ceil((len(ordered) + 1) * level)
    return ordered[rank - 1] if rank <= len(ordered) else default
