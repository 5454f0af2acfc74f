"""The driver: sends each request when it is due, independent of earlier requests (open loop), and records the outcome.

With ``max_concurrency`` a request may wait for another one to end. Its latency still counts from the time when it was
due, so the wait is measured (no coordinated omission). The driver knows neither the wire protocol nor the metrics.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import cast

from loadtest.record import OK, Record, Run
from loadtest.target import Piece, StreamEnd, Target, TargetError
from loadtest.workload import PlannedRequest
from muxmesh.clock import Clock

MAX_UNREACHABLE_IN_A_ROW = 20
"""The run stops after this many consecutive requests that could not reach the server."""
_LAG_INTERVAL_S = 0.05
"""Interval at which the driver measures how late its own event loop is."""


class Driver:
    """Drives one run.

    The counters ``num_sent``, ``num_done`` and ``num_failed``, and ``run_so_far``, may be read while it runs.
    """

    def __init__(
        self,
        target: Target,
        requests: Sequence[PlannedRequest],
        clock: Clock,
        max_concurrency: int | None = None,
    ) -> None:
        self._target = target
        self._requests = requests
        self._clock = clock
        self._slots = asyncio.Semaphore(max_concurrency) if max_concurrency else None
        self._stopped = asyncio.Event()
        self._unreachable_in_a_row = 0
        self.num_sent = self.num_done = self.num_failed = 0
        self.run_so_far = Run([Record(one.index, one.at_s, one.model, one.tenant, one.priority) for one in requests])

    def stop(self, reason: str) -> None:
        """Stops the run: no further request is sent, running requests are cancelled, ``Run.partial`` is ``reason``.

        Only the first call has an effect.
        """
        if not self._stopped.is_set():
            self.run_so_far.partial = reason
            self._stopped.set()

    def now_s(self) -> float:
        """Seconds since the start of the run."""
        return self._clock.monotonic_s() - self._started_s

    async def run(self) -> Run:
        """Sends all requests and returns when every output has ended, or the run was stopped."""
        self._started_s = self._clock.monotonic_s()
        cpu_before_s = _cpu_s()
        measuring = asyncio.create_task(self._measure_loop_lag(), name="loop lag")
        sending = asyncio.create_task(self._send_all(), name="load")
        stopping = asyncio.create_task(self._stopped.wait(), name="stop")
        try:
            await asyncio.wait((sending, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, stopping, measuring):
                task.cancel()
            await asyncio.gather(sending, stopping, measuring, return_exceptions=True)
        if sending.done() and not sending.cancelled() and (error := sending.exception()) is not None:
            raise error
        run = self.run_so_far
        last_s = max((record.ended_s for record in run.records if record.ended_s is not None), default=0.0)
        run.duration_s = self.now_s() if run.partial else last_s
        run.cpu_s = _cpu_s() - cpu_before_s
        return run

    async def _send_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for request, record in zip(self._requests, self.run_so_far.records, strict=True):
                delay_s = request.at_s - self.now_s()
                if delay_s > 0:
                    await asyncio.sleep(delay_s)
                if self._slots is not None:
                    await self._slots.acquire()
                group.create_task(self._drive_one(request, record))

    async def _drive_one(self, request: PlannedRequest, record: Record) -> None:
        record.sent_s = self.now_s()
        self.num_sent += 1
        try:
            # Every target returns an async generator. Closing it aborts the request.
            stream = cast(AsyncGenerator[Piece | StreamEnd, None], self._target.stream(request))
            async with aclosing(stream) as events:
                async for event in events:
                    if isinstance(event, Piece):
                        record.pieces.append((self.now_s(), event.num_tokens))
                    else:
                        self._end(record, event)
        except TargetError as error:
            record.status, record.error = error.status, str(error)
            record.ended_s = self.now_s()
            self.num_failed += 1
            self._count_unreachable(error)
        finally:
            if self._slots is not None:
                self._slots.release()

    def _end(self, record: Record, end: StreamEnd) -> None:
        record.ended_s = self.now_s()
        record.num_input, record.num_cached = end.num_input, end.num_cached
        record.num_output, record.finish = end.num_output, end.finish
        record.router_s = end.router_s
        record.status = OK
        self.num_done += 1
        self._unreachable_in_a_row = 0

    def _count_unreachable(self, error: TargetError) -> None:
        self._unreachable_in_a_row = self._unreachable_in_a_row + 1 if error.is_unreachable else 0
        if self._unreachable_in_a_row >= MAX_UNREACHABLE_IN_A_ROW:
            self.stop(
                f"the server is gone: {self._unreachable_in_a_row} requests in a row could not reach it ({error})"
            )

    async def _measure_loop_lag(self) -> None:
        while True:
            due_s = self.now_s() + _LAG_INTERVAL_S
            await asyncio.sleep(_LAG_INTERVAL_S)
            self.run_so_far.loop_lags_s.append(max(0.0, self.now_s() - due_s))


def _cpu_s() -> float:
    """CPU seconds of this process, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
