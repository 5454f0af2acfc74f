"""The slots of the grant page: reads demands, applies the arbiter's decisions and wakes workers. No policy.

A grant that a worker does not return is revoked: the arbiter no longer counts it, and the worker gets no other one. The
worker may still compute and return it late, which makes it an ordinary worker again.

    GRANTED_STEPS   is revoked   the arbiter takes the worker as
    0               -            waiting, if DEMAND is 1 and it was not killed (`end_grants`)
    > 0             no           computing
    > 0             yes          absent
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kvstore.arbiter import STEPS_PER_GRANT, Arbiter, Demand
from kvstore.grant_page import MAX_WORKERS, PAGE_BYTES, GrantPage, Word
from muxmesh.clock import Clock, SystemClock
from muxmesh.config.arbiter_config import ArbiterConfig
from muxmesh.errors import Overloaded
from muxmesh.types import Role


@dataclass(slots=True)
class _Slot:
    bell_fd: int
    demand: Demand
    """As the worker last described it. Built again only when ``words`` change: each round of the arbiter needs the
    demands of all workers.
    """
    words: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    """PRIORITY, DUE_US, LOST_US and ARRIVED_US in ``demand``."""
    counted_ns: int = 0
    """BUSY_NS that the arbiter knows of."""
    is_revoked: bool = False
    is_killed: bool = False
    is_recalled: bool = False
    step_end_us: int = 0
    """STEP_END_US as it was written last."""
    busy_ns: int = 0
    """BUSY_NS at the latest check: it grows with each step."""
    stalled_s: float = 0.0
    """Seconds under the grant without progress."""
    recalled_s: float = 0.0
    """The part of them since the recall."""

    def demand_by(self, words: list[int]) -> Demand:
        """As described by the words PRIORITY to ARRIVED_US that the worker has written."""
        if words != self.words:
            old, (priority, due_us, lost_us, arrived_us) = self.demand, words
            due_s, lost_s = due_us / 1e6 or math.inf, lost_us / 1e6 or math.inf
            self.words = words
            self.demand = Demand(old.slot, old.role, old.model, old.share, priority, due_s, lost_s, arrived_us / 1e6)
        return self.demand

    def count_stalled(self, elapsed_s: float) -> None:
        self.stalled_s += elapsed_s
        self.recalled_s = self.recalled_s + elapsed_s if self.is_recalled else 0.0

    def restart_count(self) -> None:
        self.stalled_s = self.recalled_s = 0.0


@dataclass(frozen=True, slots=True)
class StalledWorkers:
    """Slots whose grants were revoked now, and slots whose workers have to be killed."""

    revoked: list[int] = field(default_factory=list)
    to_kill: list[int] = field(default_factory=list)


class GrantTable:
    """Owns the grant page, the doorbell and the bells.

    Invariant: a slot without a worker is all zeros; only slots that the arbiter granted have granted steps.
    """

    def __init__(self, config: ArbiterConfig | None = None, clock: Clock | None = None) -> None:
        """``config``: resolved, see `ArbiterConfig.resolved`."""
        self.page_fd = os.memfd_create("muxmesh-grants", os.MFD_CLOEXEC)
        os.ftruncate(self.page_fd, PAGE_BYTES)
        self.doorbell_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.page = GrantPage(self.page_fd)
        self.num_revoked: dict[tuple[Role, str], int] = {}
        """Revoked grants by role and model."""
        self._config = config or ArbiterConfig()
        self._arbiter = Arbiter(self._config)
        self._clock = clock or SystemClock()
        self._slots: dict[int, _Slot] = {}

    @property
    def num_held_up(self) -> Mapping[str, int]:
        """See `Arbiter`; since the arbiter was configured."""
        return self._arbiter.num_held_up

    @property
    def longest_grant_s(self) -> float:
        """See `ArbiterConfig`."""
        return self._config.longest_grant_s

    def configure(self, config: ArbiterConfig) -> None:
        """From now on decides by ``config``, which is resolved. Grants that workers have stay as they are."""
        if config != self._config:
            self._config, self._arbiter = config, Arbiter(config)
            self.arbitrate()

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

    def end_grants(self, number: int) -> None:
        """The worker was killed: it gets no further grant, and keeps one that it has until `free_slot`."""
        self._slots[number].is_killed = True

    def on_doorbell(self) -> None:
        """Arbitrates if a worker rang the doorbell. Does not block."""
        try:
            os.eventfd_read(self.doorbell_fd)
        except BlockingIOError:
            return
        self.arbitrate()

    def arbitrate(self) -> None:
        """Reads the demands, lets the arbiter decide, writes grants and recalls, and rings the bells of new grants."""
        now_s = self._clock.monotonic_s()
        waiting, computing = [], []
        for number, slot in self._slots.items():
            num_steps, has_demand, _, *words, busy_ns = self.page.read_demand(number)
            if busy_ns != slot.counted_ns:
                self._count_use(slot, busy_ns, now_s)
            if num_steps:
                if not slot.is_revoked:
                    computing.append(slot.demand_by(words))
                continue
            slot.is_revoked = False
            if has_demand and not slot.is_killed:
                waiting.append(slot.demand_by(words))
        decision = self._arbiter.decide(waiting, computing, now_s)
        self._bound_steps(decision.granted.union(demand.slot for demand in computing), decision.step_ends_s)
        for number in decision.granted:
            self._grant(number, number not in decision.kept)
        for demand in computing:
            is_recalled = demand.slot not in decision.kept
            if is_recalled != self._slots[demand.slot].is_recalled:
                self._recall(demand.slot, is_recalled)

    def _bound_steps(self, computing: Iterable[int], step_ends_s: Mapping[int, float]) -> None:
        """Writes when the next steps of the computing workers have to end."""
        for number in computing:
            slot = self._slots[number]
            end_us = max(1, int(step_ends_s[number] * 1e6)) if number in step_ends_s else 0
            if end_us != slot.step_end_us:
                slot.step_end_us = end_us
                self.page.write(number, Word.STEP_END_US, end_us)

    def _count_use(self, slot: _Slot, busy_ns: int, now_s: float) -> None:
        demand = slot.demand
        self._arbiter.count_use(demand.model, (busy_ns - slot.counted_ns) / 1e9 * demand.share, now_s)
        slot.counted_ns = busy_ns

    def _grant(self, number: int, is_recalled: bool) -> None:
        slot = self._slots[number]
        slot.restart_count()
        self._recall(number, is_recalled)
        if slot.demand.role is Role.PREFILL:
            longest_s = self._arbiter.longest_step_s
            self.page.write(number, Word.LONGEST_STEP_US, int(longest_s * 1e6) if longest_s < math.inf else 0)
        self.page.write(number, Word.GRANTED_STEPS, STEPS_PER_GRANT)
        os.eventfd_write(slot.bell_fd, 1)

    def _recall(self, number: int, is_recalled: bool) -> None:
        self._slots[number].is_recalled = is_recalled
        self.page.write(number, Word.RECALLED, int(is_recalled))

    def revoke_stalled(self, elapsed_s: float) -> StalledWorkers:
        """Revokes recalled grants that their workers do not return. To be called at regular intervals.

        ``elapsed_s``: the interval. Intervals are counted, so that no worker is blamed for a machine that slept.
        """
        stalled = StalledWorkers()
        for number, slot in self._slots.items():
            busy_ns = self.page.read(number, Word.BUSY_NS)
            if not self.page.read(number, Word.GRANTED_STEPS) or busy_ns != slot.busy_ns:
                slot.busy_ns = busy_ns
                slot.restart_count()
                continue
            slot.count_stalled(elapsed_s)
            if slot.stalled_s - elapsed_s >= self._config.kill_after_s:  # of the first interval it may be a part only
                stalled.to_kill.append(number)
            if slot.recalled_s - elapsed_s >= self._config.longest_grant_s and not slot.is_revoked:
                slot.is_revoked = True
                stalled.revoked.append(number)
                key = slot.demand.role, slot.demand.model
                self.num_revoked[key] = self.num_revoked.get(key, 0) + 1
        if stalled.revoked:
            self.arbitrate()
        return stalled

    def close(self) -> None:
        """Closes the file descriptors of the page, the doorbell and all bells."""
        for fd in (self.page_fd, self.doorbell_fd, *(slot.bell_fd for slot in self._slots.values())):
            os.close(fd)
