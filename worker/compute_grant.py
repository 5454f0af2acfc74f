"""The worker's side of the compute grant: it writes its slot of the grant page, rings the doorbell, awaits its bell.

Knows no other worker: `kvstore.arbiter` decides which one computes next.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Awaitable, Callable

from kvstore.grant_page import Word
from muxmesh.clock import Clock
from muxmesh.engine.api import ComputeDemand
from muxmesh.engine.step import Step, StepOutcome
from muxmesh.engine.step_limit import StepLimit
from muxmesh.step_cost import CostFit, StepCost
from worker.attachment import Attachment
from worker.share_pacer import SharePacer


class ComputeGrant:
    """`muxmesh.engine.api.Grant` over the unit's grant page. Also owns the worker's counters and step cost there."""

    def __init__(
        self,
        attachment: Attachment,
        clock: Clock,
        pacer: SharePacer | None = None,
        cpu_time_s: Callable[[], float] = time.process_time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Needs a running event loop, which all methods are called on.

        ``pacer``: delays steps, by the CPU time that the process has used according to ``cpu_time_s``.
        """
        self._pacer = pacer
        self._cpu_time_s = cpu_time_s
        self._sleep = sleep
        self._page = attachment.page
        self._slot = attachment.slot
        self._doorbell_fd = attachment.doorbell_fd
        self._bell_fd = attachment.bell_fd
        self._clock = clock
        self._acquired_at_s = 0.0
        self._num_steps = 0
        """Steps computed under the present grant."""
        self._has_to_return = False
        """The grant is recalled and its steps are computed. `acquire` returns it together with the next demand, or
        `drop` without one.
        """
        self._fit = CostFit()
        self._cost: StepCost | None = None
        self._granted = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._bell_fd, self._on_bell)

    @property
    def is_recalled(self) -> bool:
        return self._page.read(self._slot, Word.RECALLED) != 0

    @property
    def step_limit(self) -> StepLimit | None:
        longest_us, end_us = (self._page.read(self._slot, word) for word in (Word.LONGEST_STEP_US, Word.STEP_END_US))
        if self._cost is None or not (longest_us or end_us):
            return None
        longest_s = longest_us / 1e6 or math.inf
        left_s = end_us / 1e6 - self._clock.monotonic_s() if end_us else math.inf
        return StepLimit(self._cost, min(longest_s, left_s))

    async def acquire(self, demand: ComputeDemand) -> None:
        self._write_demand(demand)  # first: while it pauses the demand may be revised
        if self._pacer is not None:
            await self._wait_for_share(self._pacer)
        if self._has_to_return or not self._page.read(self._slot, Word.GRANTED_STEPS):
            demanded_at_s = self._clock.monotonic_s()
            self._granted.clear()
            self._page.write(self._slot, Word.DEMAND, 1)
            if self._has_to_return:  # after the demand: a return without it would give this worker's turn away
                self._clear()
            os.eventfd_write(self._doorbell_fd, 1)
            try:
                await self._wait_for_grant()
            finally:  # also if the engine is stopped meanwhile
                self._page.write(self._slot, Word.DEMAND, 0)
            self._page.add(self._slot, Word.NUM_GRANTS, 1)
            self._page.add(self._slot, Word.GRANT_WAIT_NS, int((self._clock.monotonic_s() - demanded_at_s) * 1e9))
            self._num_steps = 0
        self._acquired_at_s = self._clock.monotonic_s()

    def revise(self, demand: ComputeDemand) -> None:
        self._write_demand(demand)
        if self._page.read(self._slot, Word.DEMAND):
            os.eventfd_write(self._doorbell_fd, 1)

    def release(self, num_steps: int) -> None:
        self._page.add(self._slot, Word.BUSY_NS, int((self._clock.monotonic_s() - self._acquired_at_s) * 1e9))
        self._num_steps += num_steps
        is_used = self._num_steps >= self._page.read(self._slot, Word.GRANTED_STEPS)
        self._has_to_return = is_used and self.is_recalled

    def drop(self) -> None:
        if self._page.read(self._slot, Word.GRANTED_STEPS):
            self._clear()
            os.eventfd_write(self._doorbell_fd, 1)

    def restart_pacing(self) -> None:
        """Does not count the CPU time that was used since the last step: it loaded the engine."""
        if self._pacer is not None:
            self._pacer.restart()

    def count_step(self, step: Step, outcome: StepOutcome, seconds: float) -> None:
        """Adds a run of steps that took ``seconds`` to the worker's counters, and its mean step to the step cost."""
        num_steps = outcome.num_steps
        self._fit.observe(step.mean_shape(num_steps), seconds / num_steps)
        if (cost := self._fit.cost) is not None and cost is not self._cost:
            self._cost = cost
            self._page.write_cost(self._slot, cost)
        self._page.add(self._slot, Word.NUM_STEPS, num_steps)
        self._page.add(self._slot, Word.NUM_COMPUTED_TOKENS, step.num_tokens * num_steps)
        self._page.add(self._slot, Word.KV_BYTES_WRITTEN, outcome.kv_bytes_written)

    def _write_demand(self, demand: ComputeDemand) -> None:
        page, slot = self._page, self._slot
        page.write(slot, Word.PRIORITY, demand.priority)
        page.write(slot, Word.ARRIVED_US, int(demand.arrived_at_s * 1e6))
        now_s = self._clock.monotonic_s()
        for word, in_s in ((Word.DUE_US, demand.slack_s), (Word.LOST_US, demand.lost_s)):
            page.write(slot, word, int((now_s + in_s) * 1e6) if math.isfinite(in_s) else 0)

    async def _wait_for_grant(self) -> None:
        while not self._page.read(self._slot, Word.GRANTED_STEPS):
            await self._granted.wait()
            self._granted.clear()

    async def _wait_for_share(self, pacer: SharePacer) -> None:
        """Waits, without the grant, until the worker has not used more CPU time than its share."""
        while (delay_s := pacer.delay_s(self._clock.monotonic_s(), self._cpu_time_s())) > 0:
            self.drop()
            await self._sleep(delay_s)

    def _clear(self) -> None:
        self._has_to_return = False
        self._page.write(self._slot, Word.GRANTED_STEPS, 0)

    def _on_bell(self) -> None:
        try:
            os.eventfd_read(self._bell_fd)
        except BlockingIOError:
            return
        self._granted.set()
