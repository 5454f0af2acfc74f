"""Which workers may compute on the device now. Pure; `grant_table` applies it, and so does the simulator's device.

A policy is a function of the workers that want to compute and those that do: it returns the set of slots that may
compute from now on. A slot in it that does not compute yet is granted a number of steps. A slot that computes and is
not in it has its grant recalled: it returns it after the steps that the grant covers, and only then is the device
free for others.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Set
from dataclasses import dataclass
from typing import Protocol

from muxmesh.types import Role

STEPS_PER_GRANT = 1
"""After so many steps a worker returns its grant if it is recalled."""


@dataclass(frozen=True, slots=True)
class Demand:
    """A worker that wants to compute.

    ``share``: of the device, in (0, 1], fixed for the worker. ``priority``: the best class of its sequences, lower is
    sooner. ``slack_s``: how long it can wait until the first of them misses its latency target.
    """

    slot: int
    role: Role
    model: str
    share: float = 1.0
    priority: int = 0
    slack_s: float = math.inf


class ArbiterPolicy(Protocol):
    """Decides who computes."""

    def __call__(self, demands: Collection[Demand], computing: Set[int], last_granted: int) -> frozenset[int]:
        """The slots that may compute now. ``demands`` are of slots that do not; ``last_granted``: -1 at first."""


def one_at_a_time(demands: Collection[Demand], computing: Set[int], last_granted: int) -> frozenset[int]:
    """The whole device to one worker, round-robin: who computes goes on only while no other worker wants to."""
    if not demands:
        return frozenset(computing)
    if computing:
        return frozenset()
    return frozenset({min((demand.slot for demand in demands), key=lambda slot: (slot <= last_granted, slot))})


def decide(
    policy: ArbiterPolicy, demands: Collection[Demand], computing: Set[int], last_granted: int
) -> tuple[frozenset[int], frozenset[int]]:
    """The slots to grant now; and of those that compute then, the ones that may go on past their grant."""
    granted = policy(demands, computing, last_granted) - computing
    waiting = [demand for demand in demands if demand.slot not in granted]
    kept = policy(waiting, computing | granted, max(granted, default=last_granted))
    return granted, kept & (computing | granted)
