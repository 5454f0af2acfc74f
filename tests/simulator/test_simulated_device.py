import itertools
import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.arbiter import Arbiter
from muxmesh.config.arbiter_config import ArbiterConfig
from muxmesh.engine.step_limit import StepLimit
from muxmesh.step_cost import StepCost, StepShape
from muxmesh.types import ArbiterMode
from simulator.simulated_device import Device
from simulator.simulated_workers import DecodeJob, DecodeWorker, PrefillJob, PrefillWorker
from simulator.step_times import LinearStepTimes, linear_slowdown
from simulator.timeline import Delays, Timeline
from tests.support.simulated_workers import (
    COST,
    STEP_S,
    decode_job,
    decode_worker,
    nothing,
    prefill_job,
    prefill_worker,
)

Jobs = list[tuple[float, int, int, int]]
"""Arrival, worker, context, tokens."""


def random_jobs(seed: int, num_workers: int, count: int = 30) -> Jobs:
    rng = random.Random(seed)
    return sorted(
        (rng.uniform(0, 1), rng.randrange(num_workers), rng.randint(1, 500), rng.randint(1, 100)) for _ in range(count)
    )


def ends_step_by_step(cost: StepCost, shares: list[float], contention: float, jobs: Jobs) -> list[float]:
    """When jobs end on decode workers that all compute at the same time, one step after the other.

    A reference without closed form: it advances from each end of a step or arrival to the next.
    """
    now_s, ends = 0.0, [math.inf] * len(jobs)
    left, context = [count for *_, count in jobs], [one[2] for one in jobs]
    batches: dict[int, tuple[float, list[int]]] = {}  # worker → seconds left of its step alone, and its jobs
    while any(left):
        for worker, share in enumerate(shares):
            batch = [i for i, one in enumerate(jobs) if one[1] == worker and one[0] <= now_s and left[i]]
            if worker not in batches and batch:
                batches[worker] = cost.step_s(len(batch), sum(context[i] for i in batch)) / share, batch
        total = sum(shares[worker] for worker in batches)
        slower = {worker: 1 + contention * (total - shares[worker]) for worker in batches}
        step_ends = {worker: now_s + batches[worker][0] * slower[worker] for worker in batches}
        arrivals = (at_s for at_s, *_ in jobs if at_s > now_s)
        next_s = min(itertools.chain(step_ends.values(), arrivals))
        for worker, (alone_s, batch) in list(batches.items()):
            if step_ends[worker] > next_s:
                batches[worker] = alone_s - (next_s - now_s) / slower[worker], batch
                continue
            del batches[worker]
            for i in batch:
                left[i], context[i] = left[i] - 1, context[i] + 1
                ends[i] = next_s
        now_s = next_s
    return ends


class OneStepRuns(DecodeWorker):
    """A worker whose runs are single steps."""

    def max_steps(self) -> int:
        return min(1, super().max_steps())


def ends_on_device(
    workers: list[DecodeWorker], mode: ArbiterMode, contention: float, jobs: Jobs
) -> tuple[list[float], Device, Timeline]:
    """When jobs end on a simulated device, beside prompts on a prefill worker for every fourth of them."""
    timeline, ends = Timeline(), [0.0] * len(jobs)
    prefill = prefill_worker(StepCost(0.004, 0.0, 0.0), model="m0", share=0.6)
    arbiter = Arbiter(ArbiterConfig(mode=mode))
    device = Device(timeline, [*workers, prefill], arbiter, slowdown=linear_slowdown(contention))

    def end(index: int) -> None:
        ends[index] = timeline.now_s

    def arrive(index: int) -> None:
        at_s, number, context, count = jobs[index]
        workers[number].add(decode_job(count, lambda: end(index), context, at_s))
        device.wake(workers[number])
        if mode != "spatial" and index % 4 == 0:
            prefill.add(prefill_job(context, arrived_at_s=at_s))
            device.wake(prefill)

    for index, (at_s, *_) in enumerate(jobs):
        timeline.at(at_s, lambda index=index: arrive(index))  # type: ignore[misc]
    timeline.run()
    return ends, device, timeline


class Recorder:
    """A device with the times at which its jobs ended."""

    def __init__(
        self, delays: Delays | None = None, num_prefill: int = 1, cost: StepCost = COST, mode: ArbiterMode = "adbs"
    ) -> None:
        self.timeline = Timeline()
        self.prefills = [prefill_worker(cost, model=f"m{number}") for number in range(num_prefill)]
        self.decode = decode_worker(cost, model="m0")
        arbiter = Arbiter(ArbiterConfig(mode=mode))
        self.device = Device(self.timeline, [*self.prefills, self.decode], arbiter, delays or Delays())
        self.ended_at_s: dict[str, float] = {}

    def prefill_at(self, at_s: float, name: str, num_tokens: int, worker: int = 0) -> None:
        self.at(at_s, self.prefills[worker], prefill_job(num_tokens, self.end(name), at_s))

    def decode_at(self, at_s: float, name: str, num_tokens: int) -> DecodeJob:
        job = decode_job(num_tokens, self.end(name), arrived_at_s=at_s)
        self.at(at_s, self.decode, job)
        return job

    def at(self, at_s: float, worker: Any, job: PrefillJob | DecodeJob) -> None:
        def run() -> None:
            worker.add(job)
            self.device.wake(worker)

        self.timeline.at(at_s, run)

    def end(self, name: str) -> Callable[[], None]:
        def end() -> None:
            self.ended_at_s[name] = self.timeline.now_s

        return end


@pytest.mark.parametrize("contention", [0.0, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_runs_of_steps_beside_others_take_as_long_as_single_steps(seed: int, contention: float) -> None:
    cost, shares, jobs = StepCost(0.003, 0.0007, 1e-6), [1.0, 0.5, 0.3], random_jobs(seed, 3)
    workers = [decode_worker(cost, f"m{number}", share) for number, share in enumerate(shares)]
    ends, device, timeline = ends_on_device(workers, "spatial", contention, jobs)
    assert ends == pytest.approx(ends_step_by_step(cost, shares, contention, jobs))
    assert timeline.num_events < sum(count for *_, count in jobs)
    assert device.use.busy_s <= max(ends) and all(device.use.granted_s[:3])
    assert device.use.peak_share == pytest.approx(1.8)


@pytest.mark.parametrize("mode", get_args(ArbiterMode))
def test_a_run_of_steps_ends_where_single_steps_would_under_every_mode(mode: ArbiterMode) -> None:
    cost, jobs, ends = StepCost(0.003, 0.0007, 1e-6), random_jobs(7, 3), []
    for kind in (DecodeWorker, OneStepRuns):
        workers = [kind(LinearStepTimes(cost), f"m{number}", share) for number, share in enumerate((0.3, 0.4, 0.8))]
        ends.append(ends_on_device(workers, mode, 0.5, jobs)[0])
    assert ends[0] == pytest.approx(ends[1])


def test_workers_whose_shares_fit_compute_at_the_same_time() -> None:
    timeline, ends = Timeline(), list[tuple[str, float]]()
    workers = [decode_worker(model=name, share=share) for name, share in (("a", 0.5), ("b", 0.5), ("c", 0.25))]
    device = Device(timeline, workers, Arbiter(ArbiterConfig()), slowdown=linear_slowdown(0.5))

    def end(name: str) -> Callable[[], None]:
        return lambda: ends.append((name, round(timeline.now_s / STEP_S, 6)))

    for worker in workers[:2]:
        worker.add(decode_job(4, end(worker.model)))
        device.wake(worker)
    timeline.run()
    step = 2 * 1.25  # half of the device, beside another half
    assert ends == [("a", 4 * step), ("b", 4 * step)]
    assert device.use.share_s == pytest.approx(device.use.busy_s) == pytest.approx(4 * step * STEP_S)
    for worker in workers:  # the third does not fit beside the others: it has to wait for a step of one of them
        worker.add(decode_job(4, end(worker.model)))
        device.wake(worker)
    timeline.run()
    assert device.use.num_grants[2] >= 1 and sum(device.use.num_grants[:2]) > 4


def test_prefill_goes_first_and_models_take_turns() -> None:
    recorder = Recorder(num_prefill=2)
    recorder.prefill_at(0.0, "a", 300, worker=0)
    recorder.prefill_at(0.0, "b", 300, worker=1)
    recorder.decode_at(0.0, "c", 3)
    recorder.timeline.run()
    assert recorder.ended_at_s == pytest.approx({"a": 0.05, "b": 0.06, "c": 0.09})
    assert recorder.device.use.granted_s == pytest.approx([0.03, 0.03, 0.03])


def test_all_workers_take_turns_under_roundrobin() -> None:
    recorder = Recorder(num_prefill=2, mode="roundrobin")
    recorder.prefill_at(0.0, "a", 300, worker=0)
    recorder.prefill_at(0.0, "b", 300, worker=1)
    recorder.decode_at(0.0, "c", 3)
    recorder.timeline.run()
    assert recorder.ended_at_s == pytest.approx({"a": 0.07, "b": 0.08, "c": 0.09})


def test_prefills_go_first_in_the_order_of_their_requests_under_fcfs() -> None:
    recorder = Recorder(num_prefill=2, mode="fcfs")
    recorder.decode_at(0.0, "decode", 3)
    recorder.prefill_at(0.001, "later", 300, worker=1)
    recorder.prefill_at(0.002, "latest", 100, worker=0)
    recorder.timeline.run()
    assert sorted(recorder.ended_at_s, key=lambda name: recorder.ended_at_s[name]) == ["later", "latest", "decode"]


def test_the_cost_fit_learns_the_steps_of_both_workers() -> None:
    cost = StepCost(0.02, 0.001, 0.00002)
    recorder, rng = Recorder(cost=cost), random.Random(1)
    for index in range(200):
        recorder.prefill_at(index * 1.0, f"p{index}", rng.randint(1, 300))
        recorder.decode_at(index * 0.7, f"d{index}", rng.randint(1, 40))
    recorder.timeline.run()
    for worker in (recorder.prefills[0], recorder.decode):
        found = worker.fit.cost
        assert found is not None
        assert (found.base_s, found.per_token_s, found.per_context_s) == pytest.approx((0.02, 0.001, 0.00002), rel=0.02)


def test_the_cost_fit_learns_steps_as_they_are_beside_others() -> None:
    timeline, workers = Timeline(), [decode_worker(model=name, share=0.5) for name in "ab"]
    device = Device(timeline, workers, Arbiter(ArbiterConfig()), slowdown=linear_slowdown(1.0))
    for worker in workers:
        worker.add(decode_job(10))
        device.wake(worker)
    timeline.run()
    assert [worker.fit.cost.step_s(1, 10) for worker in workers if worker.fit.cost] == pytest.approx([0.03, 0.03])


def test_a_device_without_work_is_idle() -> None:
    recorder = Recorder()
    recorder.device.wake(recorder.decode)
    recorder.timeline.run()
    assert recorder.device.use.busy_s == 0.0 and recorder.timeline.num_events == 0


def test_the_device_is_busy_while_it_computes_and_idle_between() -> None:
    recorder = Recorder()
    recorder.decode_at(1.0, "first", 5)
    recorder.decode_at(3.0, "second", 7)
    recorder.timeline.run()
    assert recorder.ended_at_s == pytest.approx({"first": 1.05, "second": 3.07})
    assert recorder.device.use.busy_s == pytest.approx(12 * STEP_S)


def test_work_that_arrives_during_a_run_waits_for_the_end_of_the_current_step() -> None:
    recorder = Recorder()
    recorder.decode_at(0.0, "long", 100)
    recorder.prefill_at(0.105, "prompt", 50)
    recorder.timeline.run()
    assert recorder.ended_at_s == pytest.approx({"prompt": 0.12, "long": 1.01})


def test_work_that_arrives_at_the_end_of_a_step_does_not_wait_for_the_next_one() -> None:
    recorder = Recorder()
    recorder.decode_at(0.0, "long", 100)
    recorder.prefill_at(0.1, "prompt", 50)
    recorder.timeline.run()
    assert recorder.ended_at_s["prompt"] == pytest.approx(0.11)


def test_delays_are_added_to_each_step_and_to_each_change_of_the_worker() -> None:
    recorder = Recorder(Delays(step_s=0.1, turn_s=1.0))
    recorder.decode_at(0.0, "a", 3)
    recorder.decode_at(100.0, "b", 3)  # the same worker: no turn
    recorder.prefill_at(200.0, "c", 50)
    recorder.timeline.run()
    step_s = STEP_S + 0.1
    assert recorder.ended_at_s == pytest.approx({"a": 1 + 3 * step_s, "b": 100 + 3 * step_s, "c": 201 + step_s})


def test_work_added_by_a_callback_at_the_end_of_a_run_is_in_the_next_step() -> None:
    recorder = Recorder()

    def follow_up() -> None:
        recorder.decode.add(decode_job(2, recorder.end("second")))
        recorder.device.wake(recorder.decode)

    recorder.decode.add(decode_job(3, follow_up))
    recorder.device.wake(recorder.decode)
    recorder.timeline.run()
    assert recorder.ended_at_s == pytest.approx({"second": 0.05})


def test_a_check_during_a_run_is_made_at_the_end_of_the_current_step() -> None:
    recorder, checked_at_s = Recorder(), list[float]()
    job = DecodeJob(10, 100, nothing, lambda: None, lambda: checked_at_s.append(recorder.timeline.now_s))
    recorder.decode.add(job)
    recorder.device.wake(recorder.decode)

    def check() -> None:
        recorder.decode.check_soon(job)
        recorder.device.wake(recorder.decode)

    recorder.timeline.at(0.234, check)
    recorder.timeline.run()
    assert checked_at_s == [pytest.approx(0.24)] and recorder.timeline.now_s == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("config", "longest_gap_s"),
    [
        (ArbiterConfig(mode="roundrobin", max_stall_s=0.5), 0.41),
        (ArbiterConfig(mode="roundrobin", max_stall_s=0.2), 0.21),
        (ArbiterConfig(mode="roundrobin", max_stall_s=0.1), 0.11),
        (ArbiterConfig(mode="adbs"), 0.51),
        (ArbiterConfig(mode="adbs", max_stall_s=0.2), 0.21),
        (ArbiterConfig(mode="adbs", max_stall_s=0.2, stall_budget=0), 1.81),
        (ArbiterConfig(mode="adbs", max_stall_s=0.2, stall_budget=0.01), 1.07),
    ],
)
def test_a_long_prompt_stalls_the_tokens_of_others_for_a_limited_time(
    config: ArbiterConfig, longest_gap_s: float
) -> None:
    """A chunk of 400 tokens takes 0.4 s, the smallest of 50 tokens 0.05 s, a decode step 10 ms."""
    timeline, gaps_s, times = Timeline(), [0.0], [0.0]
    prefill, decode = prefill_worker(StepCost(0.0, 0.001, 0.0), token_budget=400), decode_worker()
    prefill.fit.observe(StepShape(400, 0, 1), 0.4)  # a first step is not cut: its cost is not known
    device = Device(timeline, [prefill, decode], Arbiter(config))

    def token() -> None:
        gaps_s.append(timeline.now_s - times[-1])
        times.append(timeline.now_s)
        if len(times) < 200:
            decode.add(decode_job(1, token))
            device.wake(decode)

    decode.add(decode_job(1, token))
    device.wake(decode)

    def prompt() -> None:
        prefill.add(prefill_job(4000))
        device.wake(prefill)

    for at_s in (0.105, 0.505):
        timeline.at(at_s, prompt)
    timeline.run()
    assert not prefill.has_work() and len(times) == 200
    assert max(gaps_s) == pytest.approx(longest_gap_s, abs=0.02)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(2, 3000), st.integers(0, 1)), max_size=5),
    st.floats(0, 0.05),
    st.sampled_from([0.2, 0.5, 1.0]),
)
def test_no_gap_between_tokens_is_longer_than_the_bound_a_smallest_chunk_and_a_step(
    prompts: list[tuple[int, int, int]], base_s: float, max_stall_s: float
) -> None:
    """Arrival in seconds, tokens and model of each prompt. The budget holds all that a decode worker may need."""
    timeline, cost, decode = Timeline(), StepCost(base_s, 0.001, 0.0), decode_worker()
    workers = [prefill_worker(cost, token_budget=400, model=model) for model in "ab"]
    for worker, num_tokens in itertools.product(workers, (400, 300, 200, 100, 50, 25)):
        worker.fit.observe(StepShape(num_tokens, 0, 1), cost.step_s(num_tokens, 0))
    device = Device(timeline, [*workers, decode], Arbiter(ArbiterConfig(max_stall_s=max_stall_s, stall_budget=1)))
    times = list[float]()

    def token() -> None:
        times.append(timeline.now_s)
        if len(times) < 500:
            decode.add(decode_job(1, token))
            device.wake(decode)

    def arrive(worker: PrefillWorker, num_tokens: int) -> None:
        worker.add(prefill_job(num_tokens))
        device.wake(worker)

    timeline.at(0.0, token)
    for at_s, num_tokens, model in prompts:
        timeline.at(float(at_s), partial(arrive, workers[model], num_tokens))
    timeline.run()
    assert len(times) == 500 and not any(worker.has_work() for worker in workers)
    smallest = 2 * StepLimit(cost, 0.0).min_tokens(400)
    longest_s = max_stall_s + cost.step_s(smallest, 0) + STEP_S
    assert max(after - before for before, after in itertools.pairwise(times)) <= 1.01 * longest_s
