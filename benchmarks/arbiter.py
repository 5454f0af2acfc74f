"""The cost of one round of the arbiter: from the doorbell to the written grants, with a busy process on every core.

A round is what kvstore does when a worker returns its grant and demands the next one: it reads the doorbell and the
words of every worker, decides, writes grants and recalls, and rings bells. It must cost under 2 % of a step of 5 ms.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.report import Report
from kvstore.grant_page import Word
from kvstore.grant_table import GrantTable
from muxmesh.config.arbiter_config import ArbiterConfig
from muxmesh.types import Role

STEP_S = 0.005
MOST_PART = 0.02
NUM_ROUNDS = 5000
SHARES = {2: 1.0, 6: 0.4, 40: 0.1}
"""Workers of the unit → the share of each: one, two or ten of them compute at once."""


def _keep_busy() -> None:
    ends_at_s = time.monotonic() + 120  # in case the parent dies without ending it
    while time.monotonic() < ends_at_s:
        pass


@contextmanager
def busy_cores() -> Iterator[None]:
    """A process on each core that computes without a pause, for two minutes at most."""
    processes = [multiprocessing.Process(target=_keep_busy, daemon=True) for _ in os.sched_getaffinity(0)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
            process.join()


class Unit:
    """A grant table with workers that all have work, requests of different age, and a target for every second one."""

    def __init__(self, num_workers: int) -> None:
        config = ArbiterConfig(mode="adbs", over_subscription=0)
        self.table = GrantTable(config)
        roles = (Role.PREFILL, Role.DECODE)
        self.slots, self._bells = [], dict[int, int]()
        for index in range(num_workers):
            slot, bell_fd = self.table.allocate_slot(roles[index % 2], f"model{index // 2}", SHARES[num_workers])
            self.slots.append(slot)
            self._bells[slot] = bell_fd
            self.table.page.write(slot, Word.ARRIVED_US, 1_000_000 * index)
            self._demand(slot)
        self.table.arbitrate()

    def _demand(self, slot: int) -> None:
        page = self.table.page
        due_us = int((time.monotonic() + 1) * 1e6) if slot % 2 else 0
        for word in (Word.DUE_US, Word.LOST_US):
            page.write(slot, word, due_us)
        page.add(slot, Word.BUSY_NS, 5_000_000)
        page.write(slot, Word.DEMAND, 1)

    def end_step(self) -> None:
        """A worker with a grant returns it if it is recalled, or else another one, and demands the next."""
        page = self.table.page
        computing = [slot for slot in self.slots if page.read(slot, Word.GRANTED_STEPS)]
        slot = next((slot for slot in computing if page.read(slot, Word.RECALLED)), computing[0])
        for one in computing:
            page.write(one, Word.DEMAND, 0)
        self._demand(slot)
        page.write(slot, Word.GRANTED_STEPS, 0)
        os.eventfd_write(self.table.doorbell_fd, 1)

    def drain_bells(self) -> int:
        """Number of bells that the round rang."""
        num_grants = 0
        for bell_fd in self._bells.values():
            try:
                num_grants += os.eventfd_read(bell_fd)
            except BlockingIOError:
                continue
        return num_grants


def measure(num_workers: int) -> dict[str, float]:
    """Microseconds of a round: wall median and p99, CPU median. And the mean number of grants in a round."""
    unit = Unit(num_workers)
    unit.drain_bells()
    walls, cpus, num_grants = list[float](), list[float](), 0
    for _ in range(NUM_ROUNDS):
        unit.end_step()
        started_s, started_cpu_s = time.perf_counter(), time.thread_time()
        unit.table.on_doorbell()
        cpus.append(time.thread_time() - started_cpu_s)
        walls.append(time.perf_counter() - started_s)
        num_grants += unit.drain_bells()
    unit.table.close()
    return {
        "median_us": 1e6 * statistics.median(walls),
        "p99_us": 1e6 * statistics.quantiles(walls, n=100)[98],
        "cpu_us": 1e6 * statistics.median(cpus),
        "cpu_per_grant_us": 1e6 * statistics.median(cpus) * NUM_ROUNDS / max(1, num_grants),
        "grants_per_round": num_grants / NUM_ROUNDS,
    }


def main() -> int:
    """Measures; exit code 1 if a bar is missed."""
    report = Report("arbiter")
    with busy_cores():
        for num_workers in SHARES:
            figures = report.figures[str(num_workers)] = measure(num_workers)
            print(f"{num_workers} workers: {', '.join(f'{name} {value:.1f}' for name, value in figures.items())}")
            for name in ("median_us", "cpu_us"):
                limit_us = MOST_PART * STEP_S * 1e6
                report.bar(
                    f"round of {num_workers} workers, {name}", figures[name], f"< {limit_us:.0f}",
                    figures[name] < limit_us,
                )  # fmt: skip
    return 0 if report.write() else 1


if __name__ == "__main__":
    sys.exit(main())
