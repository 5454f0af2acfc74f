"""An upper bound that holds nine times in ten, whatever the errors look like. Pure.

Rolling split-conformal prediction (Vovk et al. 2005): the bound is where nine in ten of the last scores were. Scores
drift, so the level follows what was missed lately (adaptive conformal inference, Gibbs and Candès 2021).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

FIRST_BOUND = 1.6
"""About where nine in ten errors are, as long as nothing is known of them."""
_WINDOW = 512
_STEP = 0.005
_MOST_DRIFT, _HIGHEST = 0.4, 0.995
_SOLVE_EVERY = 8


class ConformalBound:
    """Owns the last scores: errors in units of their predicted spread, signed, too short is positive."""

    def __init__(self, level: float = 0.9, first_bound: float = FIRST_BOUND) -> None:
        """``first_bound`` is used until there are enough scores."""
        self.bound = first_bound
        self._level = self._target = level
        self._scores: deque[float] = deque(maxlen=_WINDOW)
        self._since_solved = 0

    def observe(self, score: float, bound: float) -> None:
        """A score, and the bound that was given out for it."""
        missed = score > bound
        level = self._level + _STEP * (missed - (1 - self._target))
        self._level = min(_HIGHEST, self._target + _MOST_DRIFT, max(self._target - _MOST_DRIFT, level))
        self._scores.append(score)
        self._since_solved += 1
        if self._since_solved >= _SOLVE_EVERY:
            self._since_solved = 0
            self.bound = _upper(self._scores, self._level, self.bound)

    @property
    def scores(self) -> list[float]:
        """The last scores, oldest first."""
        return list(self._scores)

    def restore(self, scores: Iterable[float]) -> None:
        """Goes on from what `scores` gave."""
        self._scores.extend(scores)
        self.bound = _upper(self._scores, self._level, self.bound)


def _upper(scores: Iterable[float], level: float, otherwise: float) -> float:
    """The ``ceil((n + 1) * level)``-th smallest score; ``otherwise`` if there are too few for one."""
    ordered = sorted(scores)
    place = math.ceil((len(ordered) + 1) * level)
    return ordered[place - 1] if place <= len(ordered) else otherwise
