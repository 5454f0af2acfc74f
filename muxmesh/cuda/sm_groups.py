"""Which SMs of a GPU each worker of a unit is limited to, where green contexts limit them. A decision, without I/O.

The driver divides a GPU into groups of SMs, the same ones in each process. Left to itself, it would give each process
the first ones: two workers would then share these while the others are idle (docs/log.md, 2026-11-28: two workers with
40 and 30 % got 1.16 times the work of one after another, on groups of their own 1.71 times).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SmGroups:
    """The groups into which the driver divides a GPU's SMs; `count` times `num_sms` may leave some over."""

    count: int
    num_sms: int
    """SMs of each group."""


@dataclass(frozen=True, slots=True)
class SmShare:
    """The part of a GPU's SMs to which one worker is limited, among those of the unit's other workers."""

    shares: tuple[int, ...]
    """Of each worker of the unit, in percent of the SMs, in the same order in each of its processes. 100: no limit."""
    index: int
    """Of this worker in ``shares``."""

    @property
    def percent(self) -> int:
        return self.shares[self.index]

    def groups(self, gpu: SmGroups, num_sms: int) -> tuple[int, ...]:
        """The numbers of this worker's groups, of a GPU with ``num_sms`` SMs. See `divide`."""
        return divide(self.shares, gpu, num_sms)[self.index]


def alone(percent: int) -> SmShare:
    """The share of a process beside which no other one is limited."""
    return SmShare((percent,), 0)


def divide(shares: Sequence[int], gpu: SmGroups, num_sms: int) -> list[tuple[int, ...]]:
    """Chooses the groups of each share, as many as it pays for, at least one, at most all of them.

    The largest shares choose first, one group after the other. Each takes the group that the fewest workers have beside
    which it may compute (the shares of both are at most 100 together), then that which the fewest have at all, then
    that of workers with which it has the fewest in common so far, then the first.
    """
    chosen: dict[int, set[int]] = {}
    for index in sorted(range(len(shares)), key=lambda each: -shares[each]):
        share, own = shares[index], set[int]()
        if share >= 100:
            chosen[index] = set(range(gpu.count))
            continue

        def contention(group: int, share: int = share, own: set[int] = own) -> tuple[int, int, int, int]:
            others = [other for other, groups in chosen.items() if group in groups and shares[other] < 100]
            beside = sum(share + shares[other] <= 100 for other in others)
            return beside, len(others), sum(len(own & chosen[other]) for other in others), group

        for _ in range(min(gpu.count, max(1, num_sms * share // 100 // gpu.num_sms))):
            own.add(min(set(range(gpu.count)) - own, key=contention))
        chosen[index] = own
    return [tuple(sorted(chosen[index])) for index in range(len(shares))]
