"""An estimate of the seconds that the rest of a profile takes, from those that were measured. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from muxmesh.placement.measured_cells import Cell
from muxmesh.types import Role


class RemainingTime:
    """Owns the counts. Seconds of a prefill are taken to grow with its tokens, those of other measurements not."""

    def __init__(self, cells: Sequence[Cell], num_groups: int, group_s: float) -> None:
        """``group_s``: seconds of a group until one was measured."""
        self._group_s = group_s
        self.num_total = len(cells) + num_groups
        self.num_done = 0
        self._left = {role: sum(_size(cell) for cell in cells if cell.role == role) for role in Role}
        self._done = dict.fromkeys(Role, 0.0)
        self._cells_s = dict.fromkeys(Role, 0.0)
        self._groups_left, self._groups_done, self._groups_s = num_groups, 0, 0.0

    @property
    def num_left(self) -> int:
        return self.num_total - self.num_done

    def cell_done(self, cell: Cell, seconds: float) -> None:
        self.num_done += 1
        self._left[cell.role] -= _size(cell)
        self._done[cell.role] += _size(cell)
        self._cells_s[cell.role] += seconds

    def group_done(self, seconds: float) -> None:
        self.num_done += 1
        self._groups_left -= 1
        self._groups_done += 1
        self._groups_s += seconds

    @property
    def seconds(self) -> float | None:
        """None before the first measurement."""
        if not self.num_done:
            return None
        rates = [
            (self._left[role], self._cells_s[role] / self._done[role] if self._done[role] else 0.0) for role in Role
        ]
        rates.append((self._groups_left, self._groups_s / self._groups_done if self._groups_done else self._group_s))
        return sum(left * rate for left, rate in rates)


def _size(cell: Cell) -> float:
    """What the time of a measurement is proportional to."""
    return cell.batch * cell.length * 100 / cell.share if cell.role == Role.PREFILL else 1.0
