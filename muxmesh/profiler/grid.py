"""Which cells a profile has, and the order in which they are measured. Pure.

The order is from coarse to fine: first the corners of the grid, then what lies between them, so that a profile that was
interrupted covers the whole range. Knows no processes, and no times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from muxmesh.placement.measured_cells import Cell
from muxmesh.types import Role

DECODE_STEPS = 64
"""A batch is decoded for so many steps, then again from the length of its cell."""
_SPARE_TOKENS = DECODE_STEPS + 32
"""KV memory of each sequence beyond its length: for those steps, and for the rest of a block."""
_SHORTEST = 64
_LONGEST = 4096
_LENGTH_FACTOR = 4
_SHARES = (25, 50, 75, 100)


def num_kv_tokens(cell: Cell) -> int:
    """Tokens for which a timer needs KV memory to measure ``cell``."""
    return cell.batch * (cell.length + _SPARE_TOKENS)


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What bounds the cells of a model."""

    name: str
    max_num_seqs: int
    max_model_len: int
    """Limit on prompt and output together, in tokens."""
    max_kv_tokens: int
    """Tokens that the KV pool holds."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The axes of a profile, each ascending, and a bound on prefill cells."""

    shares: tuple[int, ...]
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    max_prefill_tokens: int
    """A prefill of more tokens, over all prompts, is not measured: it is a longer sequence of equal steps."""

    def holds(self, cell: Cell, limits: ModelLimits) -> bool:
        """Whether ``cell`` is measured: the model and its KV pool allow it, and a prefill is not too long."""
        fits = (
            cell.batch <= limits.max_num_seqs
            and cell.length < limits.max_model_len
            and num_kv_tokens(cell) <= limits.max_kv_tokens
        )
        return fits and (cell.role == Role.DECODE or cell.batch * cell.length <= self.max_prefill_tokens)


def default_batches(limits: Sequence[ModelLimits]) -> tuple[int, ...]:
    """1, 2, 4, ... up to the largest `max_num_seqs`, which is the last."""
    largest = max(one.max_num_seqs for one in limits)
    powers = [1 << bits for bits in range(largest.bit_length())]
    return tuple(dict.fromkeys([*powers, largest]))


def default_lengths(limits: Sequence[ModelLimits]) -> tuple[int, ...]:
    """64, 256, 1024, 4096, as far as the longest context allows; at least one length."""
    longest = max(min(one.max_model_len, one.max_kv_tokens) for one in limits) - 1
    lengths, length = [], _SHORTEST
    while length <= min(longest, _LONGEST):
        lengths.append(length)
        length *= _LENGTH_FACTOR
    return tuple(lengths) or (max(1, longest),)


def default_shares(are_limited: bool) -> tuple[int, ...]:
    """Quarters of the device if something limits a worker to its share, else the whole device."""
    return _SHARES if are_limited else (100,)


def cells_of(grid: Grid, models: Sequence[ModelLimits]) -> list[list[Cell]]:
    """The cells of all models in rounds from coarse to fine; those of a round by model and share."""
    shares, batches, lengths = _levels(grid.shares), _levels(grid.batches), _levels(grid.lengths)
    rounds: dict[int, list[Cell]] = {}
    for limits, share, role, batch, length in product(models, grid.shares, Role, grid.batches, grid.lengths):
        cell = Cell(limits.name, role, share, batch, length)
        if grid.holds(cell, limits):
            level = max(shares[share], batches[batch], lengths[length])
            rounds.setdefault(level, []).append(cell)
    return [rounds[level] for level in sorted(rounds)]


def _levels(axis: Sequence[int]) -> dict[int, int]:
    """The level of each value of an axis: 0 for both ends, 1 for the middle, 2 for what lies between, and so on."""
    levels = {axis[0]: 0, axis[-1]: 0}
    pending = [(0, len(axis) - 1, 1)]
    while pending:
        first, last, level = pending.pop()
        middle = (first + last) // 2
        if middle in (first, last):
            continue
        levels[axis[middle]] = level
        pending += [(first, middle, level + 1), (middle, last, level + 1)]
    return levels
