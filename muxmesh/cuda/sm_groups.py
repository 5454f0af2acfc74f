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
    """Of each worker of the unit, in percent of the SMs, in the order of its models. 100: no limit."""
    index: int
    """Of this worker in ``shares``."""

    @property
    def percent(self) -> int:
        return self.shares[self.index]

    def groups(self, gpu: SmGroups, num_sms: int) -> tuple[int, ...]:
        """The numbers of this worker's groups, of a GPU with ``num_sms`` SMs. See `divide`."""
        return divide(self.shares, gpu, num_sms)[self.index]


def joining(percent: int, before: Sequence[int] = ()) -> SmShare:
    """The share of a process that is started beside those with the shares ``before``, which do not know of it."""
    return SmShare((*before, percent), len(before))


def divide(shares: Sequence[int], gpu: SmGroups, num_sms: int) -> list[tuple[int, ...]]:
    """Chooses the groups of each share. If all are at most 100 together, none has two workers, unless some share is too
    small for a group.

    Otherwise they meet as little as possible. One share after the other takes one group after the other: that which the
    fewest workers have beside which it may compute (the shares of both are at most 100 together), then that which the
    fewest have at all, then that of workers with which it has the fewest in common so far, then the first. So a model
    that is added changes nothing for those before it, but for one group where rounding was in favour of one.
    """
    chosen: list[set[int]] = []
    for share, wanted in zip(shares, _numbers(shares, gpu, num_sms), strict=True):
        own = set[int]()

        def contention(group: int, share: int = share, own: set[int] = own) -> tuple[int, int, int, int]:
            others = [other for other, groups in enumerate(chosen) if group in groups and shares[other] < 100]
            beside = sum(share + shares[other] <= 100 for other in others)
            return beside, len(others), sum(len(own & chosen[other]) for other in others), group

        for _ in range(wanted):
            own.add(min(set(range(gpu.count)) - own, key=contention))
        chosen.append(own)
    return [tuple(sorted(own)) for own in chosen]


def _numbers(shares: Sequence[int], gpu: SmGroups, num_sms: int) -> list[int]:
    """How many groups each share has: what it pays for, at least one. The SMs that are left over count for that.

    If all are at most 100 together but would pay for more than there are, rounding decides: what it leaves goes to the
    largest remainders (Hamilton's method).
    """
    paid = (max(1, num_sms * share // 100 // gpu.num_sms) for share in shares)
    most = [gpu.count if share >= 100 else min(gpu.count, number) for share, number in zip(shares, paid, strict=True)]
    if sum(shares) > 100 or sum(most) <= gpu.count:
        return most
    numbers = [max(1, gpu.count * share // 100) for share in shares]
    left = gpu.count * sum(shares) // 100 - sum(numbers)
    for index in sorted(range(len(shares)), key=lambda each: -(gpu.count * shares[each] % 100)):
        if left > 0 and numbers[index] < most[index]:
            numbers[index] += 1
            left -= 1
    return numbers
