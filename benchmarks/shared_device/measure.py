"""Runs of one system: the planned requests in open loop, requests one at a time, and as fast as it can."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from loadtest.drive import Driver
from loadtest.record import Record, Run
from loadtest.slo import Unloaded, fit_unloaded
from loadtest.target import Target
from loadtest.workload import PlannedRequest
from muxmesh.clock import SystemClock

_SKIPPED = 0.2
"""Part of the requests of a capacity run at each end that is not counted: the batch fills, and empties."""


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """The order of the systems in a round: each comes as often early as late."""
    return list(names) if number % 2 == 0 else list(reversed(names))


async def drive(target: Target, requests: Sequence[PlannedRequest], duration_s: float, drain_s: float) -> Run:
    """Sends every request when it is due. Waits for the outputs until ``drain_s`` after ``duration_s``, then stops."""
    driver = Driver(target, requests, SystemClock())
    limit = asyncio.get_running_loop().call_later(
        duration_s + drain_s, driver.stop, f"{drain_s:g} s after the last request"
    )
    try:
        return await driver.run()
    finally:
        limit.cancel()


async def one_at_a_time(target: Target, requests: Sequence[PlannedRequest]) -> list[Record]:
    """Each request alone on the idle system."""
    records: list[Record] = []
    for request in requests:
        run = await Driver(target, [replace(request, at_s=0.0)], SystemClock()).run()
        records += run.records
    return records


async def unloaded_of(target: Target, requests: Sequence[PlannedRequest], each: int) -> dict[str, Unloaded]:
    """Model → its latency on the idle system, fitted to ``each`` of its requests. The first one is a warm-up."""
    found = {}
    for model in sorted({request.model or "" for request in requests}):
        mine = [request for request in requests if request.model == model][: each + 1]
        found[model] = fit_unloaded((await one_at_a_time(target, mine))[1:])
    return found


async def capacity(target: Target, requests: Sequence[PlannedRequest], at_once: int) -> float:
    """Requests per second with ``at_once`` requests in the system all the time."""
    now = [replace(request, at_s=0.0) for request in requests]
    run = await Driver(target, now, SystemClock(), max_concurrency=at_once).run()
    return rate_of_ends(sorted(record.ended_s for record in run.records if record.is_ok and record.ended_s))


def rate_of_ends(ends_s: Sequence[float]) -> float:
    """Ends per second in the middle of the sorted ``ends_s``."""
    first = int(len(ends_s) * _SKIPPED)
    last = len(ends_s) - 1 - first
    return (last - first) / (ends_s[last] - ends_s[first])
