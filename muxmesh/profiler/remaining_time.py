"""An estimate of the seconds that the rest of a profile takes, from those that were measured. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muxmesh.placement.measured_cells import Cell
from muxmesh.types import Role


@dataclass(slots=True)
class _Kind:
    """Measurements whose time is proportional to their size."""

    left: float
    """Sizes that are left, in all."""
    assumed_s: float = 0.0
    """Seconds of size 1 until one was measured."""
    done: float = 0.0
    done_s: float = 0.0

    def add(self, size: float, seconds: float) -> None:
        self.left -= size
        self.done += size
        self.done_s += seconds

    @property
    def left_s(self) -> float:
        return self.left * (self.done_s / self.done if self.done else self.assumed_s)


class RemainingTime:
    """Owns the counts. Seconds of a prefill are taken to grow with its tokens, those of other measurements not."""

    def __init__(self, cells: Sequence[Cell], num_groups: int, group_s: float) -> None:
        """``group_s``: seconds of a group until one was measured."""
        self.num_total = len(cells) + num_groups
        self.num_done = 0
        self._cells = {role: _Kind(sum(_size(cell) for cell in cells if cell.role == role)) for role in Role}
        self._groups = _Kind(num_groups, group_s)

    @property
    def num_left(self) -> int:
        return self.num_total - self.num_done

    def cell_done(self, cell: Cell, seconds: float) -> None:
        self.num_done += 1
        self._cells[cell.role].add(_size(cell), seconds)

    def group_done(self, seconds: float) -> None:
        self.num_done += 1
        self._groups.add(1, seconds)

    @property
    def seconds(self) -> float | None:
        """None before the first measurement."""
        if not self.num_done:
            return None
        return sum(kind.left_s for kind in (*self._cells.values(), self._groups))


def _size(cell: Cell) -> float:
    """What the time of a measurement is proportional to."""
    return cell.batch * cell.length * 100 / cell.share if cell.role == Role.PREFILL else 1.0
