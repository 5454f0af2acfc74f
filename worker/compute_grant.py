"""The worker's side of the compute grant: it writes its slot of the grant page, rings the doorbell, awaits its bell.

`kvstore.arbiter` decides which worker computes next; nothing here does.
"""

from __future__ import annotations

import asyncio
import os

from kvstore.grant_page import Word
from muxmesh.clock import Clock
from muxmesh.engine.step import Step, StepOutcome
from muxmesh.step_cost import CostFit, StepCost
from worker.attachment import Attachment


class ComputeGrant:
    """`muxmesh.engine.api.Grant` over the unit's grant page. Also owns the worker's counters and step cost there."""

    def __init__(self, attachment: Attachment, clock: Clock) -> None:
        """Needs a running event loop, which all methods are called on."""
        self._page = attachment.page
        self._slot = attachment.slot
        self._doorbell_fd = attachment.doorbell_fd
        self._bell_fd = attachment.bell_fd
        self._clock = clock
        self._acquired_at_s = 0.0
        self._num_steps = 0
        """Steps computed under the present grant."""
        self._fit = CostFit()
        self._cost: StepCost | None = None
        self._granted = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._bell_fd, self._on_bell)

    @property
    def is_recalled(self) -> bool:
        return self._page.read(self._slot, Word.RECALLED) != 0

    async def acquire(self) -> None:
        if not self._page.read(self._slot, Word.GRANTED_STEPS):
            self._granted.clear()
            self._page.write(self._slot, Word.DEMAND, 1)
            os.eventfd_write(self._doorbell_fd, 1)
            while not self._page.read(self._slot, Word.GRANTED_STEPS):
                await self._granted.wait()
                self._granted.clear()
            self._page.write(self._slot, Word.DEMAND, 0)
            self._page.add(self._slot, Word.NUM_GRANTS, 1)
            self._num_steps = 0
        self._acquired_at_s = self._clock.monotonic_s()

    def release(self, num_steps: int) -> None:
        self._page.add(self._slot, Word.BUSY_NS, int((self._clock.monotonic_s() - self._acquired_at_s) * 1e9))
        self._num_steps += num_steps
        is_used = self._num_steps >= self._page.read(self._slot, Word.GRANTED_STEPS)
        if is_used and self.is_recalled:
            self._return()

    def drop(self) -> None:
        if self._page.read(self._slot, Word.GRANTED_STEPS):
            self._return()

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

    def _return(self) -> None:
        self._page.write(self._slot, Word.GRANTED_STEPS, 0)
        os.eventfd_write(self._doorbell_fd, 1)

    def _on_bell(self) -> None:
        try:
            os.eventfd_read(self._bell_fd)
        except BlockingIOError:
            return
        self._granted.set()
