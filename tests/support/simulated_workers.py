"""Jobs and workers for tests of the simulated device."""

from __future__ import annotations

from collections.abc import Callable

from muxmesh.remaining_work import RemainingWork
from muxmesh.scheduling_policy import FCFS
from muxmesh.step_cost import StepCost
from muxmesh.types import SchedulingState
from simulator.simulated_workers import DecodeJob, DecodeWorker, PrefillJob, PrefillWorker
from simulator.step_times import LinearStepTimes

STEP_S = 0.01
COST = StepCost(STEP_S, 0.0, 0.0)


def nothing() -> None:
    """A callback."""


def decode_job(
    num_left: int, done: Callable[[], None] = nothing, num_context: int = 10, arrived_at_s: float = 0.0
) -> DecodeJob:
    """A sequence that never needs attention."""
    work = RemainingWork(SchedulingState(0, arrived_at_s), None)
    return DecodeJob(num_context, num_left, done, lambda: None, nothing, work)


def prefill_job(num_tokens: int, done: Callable[[], None] = nothing, arrived_at_s: float = 0.0) -> PrefillJob:
    """A prompt of which nothing is cached."""
    return PrefillJob(SchedulingState(0, arrived_at_s), 0, num_tokens, done)


def prefill_worker(
    cost: StepCost = COST, token_budget: int = 100, max_num_seqs: int = 8, model: str = "m", share: float = 1.0
) -> PrefillWorker:
    """A prefill worker whose step times are inversely proportional to its share."""
    return PrefillWorker(LinearStepTimes(cost), FCFS, token_budget, max_num_seqs, model, share)


def decode_worker(cost: StepCost = COST, model: str = "m", share: float = 1.0) -> DecodeWorker:
    """A decode worker whose step times are inversely proportional to its share."""
    return DecodeWorker(LinearStepTimes(cost), model, share)
