"""The slots of the grant page: reads demands, applies the arbiter's decisions and wakes workers. No policy."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

from kvstore.arbiter import STEPS_PER_GRANT, ArbiterPolicy, Demand, decide, one_at_a_time, slots_of
from kvstore.grant_page import MAX_WORKERS, PAGE_BYTES, GrantPage, Word
from muxmesh.errors import Overloaded
from muxmesh.types import Role


@dataclass(frozen=True, slots=True)
class _Slot:
    bell_fd: int
    demand: Demand
    """As long as the worker reports neither a priority nor a slack."""


class GrantTable:
    """Owns the grant page, the doorbell and the bells.

    Invariant: a slot without a worker is all zeros; only slots that the policy returned have granted steps.
    """

    def __init__(self, policy: ArbiterPolicy = one_at_a_time) -> None:
        self.page_fd = os.memfd_create("muxmesh-grants", os.MFD_CLOEXEC)
        os.ftruncate(self.page_fd, PAGE_BYTES)
        self.doorbell_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.page = GrantPage(self.page_fd)
        self._policy = policy
        self._slots: dict[int, _Slot] = {}
        self._last_granted = -1

    def allocate_slot(self, role: Role, model: str, share: float = 1.0) -> tuple[int, int]:
        """Returns a free slot, all zeros, and its bell. Raises Overloaded if there are `MAX_WORKERS` workers."""
        number = next((number for number in range(MAX_WORKERS) if number not in self._slots), None)
        if number is None:
            raise Overloaded(f"a unit has at most {MAX_WORKERS} workers")
        self.page.clear(number)
        bell_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._slots[number] = _Slot(bell_fd, Demand(number, role, model, share))
        return number, bell_fd

    def free_slot(self, number: int) -> None:
        """Frees a slot and its grant. The worker's processes must have exited."""
        os.close(self._slots.pop(number).bell_fd)
        self.page.clear(number)
        self.arbitrate()

    def on_doorbell(self) -> None:
        """Arbitrates if a worker rang the doorbell. Does not block."""
        try:
            os.eventfd_read(self.doorbell_fd)
        except BlockingIOError:
            return
        self.arbitrate()

    def arbitrate(self) -> None:
        """Reads the demands, applies the policy, writes grants and recalls, and rings the bells of new grants."""
        page = self.page
        waiting, computing = [], []
        for number, slot in self._slots.items():
            if page.read(number, Word.GRANTED_STEPS):
                computing.append(self._demand(number, slot))
            elif page.read(number, Word.DEMAND):
                waiting.append(self._demand(number, slot))
        granted, kept = decide(self._policy, waiting, computing, self._last_granted)
        for number in slots_of(computing) | granted:
            page.write(number, Word.RECALLED, int(number not in kept))
        for number in sorted(granted):
            self._last_granted = number
            page.write(number, Word.GRANTED_STEPS, STEPS_PER_GRANT)
            os.eventfd_write(self._slots[number].bell_fd, 1)

    def close(self) -> None:
        """Closes the file descriptors of the page, the doorbell and all bells."""
        for fd in (self.page_fd, self.doorbell_fd, *(slot.bell_fd for slot in self._slots.values())):
            os.close(fd)

    def _demand(self, number: int, slot: _Slot) -> Demand:
        priority, slack_us = self.page.read(number, Word.PRIORITY), self.page.read(number, Word.SLACK_US)
        if not priority and not slack_us:
            return slot.demand
        return replace(slot.demand, priority=priority, slack_s=slack_us / 1e6 if slack_us else math.inf)
