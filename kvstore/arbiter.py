"""Which workers may compute on the device. Pure: `grant_table` applies the decisions, and so does the simulator.

Each attached worker has a slot. A policy is a function of the workers that wait for a grant and of those that compute.
It returns the slots that may compute from here on:

    slot                          in the result                    not in the result
    waits                         granted STEPS_PER_GRANT steps    waits
    computes                      keeps its grant                  its grant is recalled

A worker returns a recalled grant when it has computed the steps of the grant. The device is free for other workers only
after that.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from muxmesh.types import Role

STEPS_PER_GRANT = 1
"""A worker checks for a recall after this many steps."""


@dataclass(frozen=True, slots=True)
class Demand:
    """A worker that waits for a grant, or computes.

    ``share``: its fixed part of the device, in (0, 1]. ``priority``: the best class of its sequences, lower is sooner.
    ``slack_s``: seconds until the first of its sequences misses its latency target; infinite without a target.
    """

    slot: int
    role: Role
    model: str
    share: float = 1.0
    priority: int = 0
    slack_s: float = math.inf


class ArbiterPolicy(Protocol):
    """Decides which slots compute."""

    def __call__(self, waiting: Collection[Demand], computing: Collection[Demand], last_granted: int) -> frozenset[int]:
        """Returns the slots that may compute from here on, out of both collections.

        ``waiting``: workers without a grant. ``computing``: workers with one, so that a policy can add up what they
        use of the device. ``last_granted``: the slot of the latest grant, -1 before the first one.
        """


def one_at_a_time(waiting: Collection[Demand], computing: Collection[Demand], last_granted: int) -> frozenset[int]:
    """Grants the whole device to one worker at a time, round-robin. It keeps the grant while no other demands it."""
    if not waiting:
        return slots_of(computing)
    if computing:
        return frozenset()
    return frozenset({min(slots_of(waiting), key=lambda slot: (slot <= last_granted, slot))})


def all_at_once(waiting: Collection[Demand], computing: Collection[Demand], last_granted: int) -> frozenset[int]:
    """Grants the device to every worker that demands it: the hardware limits each to its share, as CUDA MPS does."""
    return slots_of(waiting) | slots_of(computing)


def decide(
    policy: ArbiterPolicy, waiting: Collection[Demand], computing: Collection[Demand], last_granted: int
) -> tuple[frozenset[int], frozenset[int]]:
    """Returns the slots to grant, and of all slots that compute then, those whose grant is not recalled.

    The policy runs twice: the second time with the new grants in effect, so that a grant is recalled from its start if
    other workers wait already.
    """
    granted = policy(waiting, computing, last_granted) & slots_of(waiting)
    still_waiting = [demand for demand in waiting if demand.slot not in granted]
    now_computing = [*computing, *(demand for demand in waiting if demand.slot in granted)]
    kept = policy(still_waiting, now_computing, max(granted, default=last_granted))
    return granted, kept & slots_of(now_computing)


def slots_of(demands: Iterable[Demand]) -> frozenset[int]:
    """The slots of workers."""
    return frozenset(demand.slot for demand in demands)
