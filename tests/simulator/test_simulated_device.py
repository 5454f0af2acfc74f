import random
from collections.abc import Callable, Collection

import pytest

from kvstore.arbiter import Demand, slots_of
from muxmesh.scheduling_policy import FCFS
from muxmesh.step_cost import StepCost
from muxmesh.types import Role, SchedulingState
from simulator.simulated_device import DecodeJob, DecodeWorker, Device, PrefillJob, PrefillWorker
from simulator.timeline import Delays, Timeline

STEP_S = 0.01
COST = StepCost(STEP_S, 0.0, 0.0)


def nothing() -> None:
    """A callback."""


def decode_job(num_left: int, done: Callable[[], None] = nothing, num_context: int = 10) -> DecodeJob:
    return DecodeJob(num_context, num_left, done, lambda: None, nothing)


def prefill_job(num_tokens: int, done: Callable[[], None] = nothing, arrived_at_s: float = 0.0) -> PrefillJob:
    return PrefillJob(SchedulingState(0, arrived_at_s), 0, num_tokens, done)


def prefill_worker(cost: StepCost = COST, token_budget: int = 100, max_num_seqs: int = 8) -> PrefillWorker:
    return PrefillWorker(cost, FCFS, token_budget, max_num_seqs)


def run_steps(worker: DecodeWorker, num_steps: int) -> None:
    worker.plan(0.0)
    assert num_steps <= worker.max_steps()
    worker.apply(num_steps)


def ends_of_single_steps(cost: StepCost, jobs: list[tuple[float, int, int]]) -> list[float]:
    """When jobs (arrival, context, tokens) end on one decode worker that runs one step after the other."""
    now_s, left, ends = 0.0, [count for *_, count in jobs], [0.0] * len(jobs)
    done = [0] * len(jobs)
    while any(left):
        batch = [i for i, (at_s, *_) in enumerate(jobs) if at_s <= now_s + 1e-12 and left[i]]
        if not batch:
            now_s = min(at_s for i, (at_s, *_) in enumerate(jobs) if left[i])
            continue
        now_s += cost.step_s(len(batch), sum(jobs[i][1] + done[i] for i in batch))
        for i in batch:
            left[i] -= 1
            done[i] += 1
            ends[i] = now_s if not left[i] else ends[i]
    return ends


class Recorder:
    """A device with the times at which its jobs ended."""

    def __init__(self, delays: Delays | None = None, num_prefill: int = 1, cost: StepCost = COST) -> None:
        self.timeline = Timeline()
        self.prefills = [prefill_worker(cost) for _ in range(num_prefill)]
        self.decode = DecodeWorker(cost)
        self.device = Device(self.timeline, [*self.prefills, self.decode], delays or Delays())
        self.ended_at_s: dict[str, float] = {}

    def prefill_at(self, at_s: float, name: str, num_tokens: int, worker: int = 0) -> None:
        self._at(at_s, lambda: self.prefills[worker].add(prefill_job(num_tokens, self._end(name), at_s)))

    def decode_at(self, at_s: float, name: str, num_tokens: int) -> DecodeJob:
        job = decode_job(num_tokens, self._end(name))
        self._at(at_s, lambda: self.decode.add(job))
        return job

    def _at(self, at_s: float, event: Callable[[], None]) -> None:
        def run() -> None:
            event()
            self.device.wake()

        self.timeline.at(at_s, run)

    def _end(self, name: str) -> Callable[[], None]:
        def end() -> None:
            self.ended_at_s[name] = self.timeline.now_s

        return end


# PrefillWorker


def test_a_prefill_step_is_divided_as_by_the_engine() -> None:
    worker, done = prefill_worker(), list[str]()
    for name, count in (("a", 60), ("b", 60), ("c", 10)):
        worker.add(prefill_job(count, lambda name=name: done.append(name), ord(name)))  # type: ignore[misc]
    worker.plan(0.0)
    worker.apply(1)
    assert done == ["a"]
    worker.plan(0.0)
    worker.apply(1)
    assert done == ["a", "b", "c"] and not worker.has_work()


def test_a_prefill_step_takes_at_most_max_num_seqs_prompts() -> None:
    worker, done = prefill_worker(max_num_seqs=2), list[int]()
    for number in range(3):
        worker.add(prefill_job(1, lambda number=number: done.append(number), number))  # type: ignore[misc]
    worker.plan(0.0)
    worker.apply(1)
    assert done == [0, 1] and worker.has_work()


def test_a_chunk_costs_its_tokens_and_the_context_that_they_attend_to() -> None:
    worker = prefill_worker(StepCost(1.0, 0.1, 0.01))
    worker.add(prefill_job(130))
    worker.plan(0.0)
    assert worker.duration_s(1) == pytest.approx(1 + 100 * 0.1 + 0.01 * sum(range(100)))
    worker.apply(1)
    worker.plan(0.0)
    assert worker.duration_s(1) == pytest.approx(1 + 30 * 0.1 + 0.01 * sum(range(100, 130)))


def test_cached_tokens_of_a_prompt_are_attended_to_and_not_computed() -> None:
    worker = prefill_worker(StepCost(0.0, 1.0, 1.0))
    worker.add(PrefillJob(SchedulingState(0, 0.0), 50, 2, nothing))
    worker.plan(0.0)
    assert worker.duration_s(1) == 2 + (50 + 51)


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


# DecodeWorker


def test_a_run_of_decode_steps_lasts_until_the_first_sequence_ends() -> None:
    worker, done = DecodeWorker(COST), list[int]()
    for count in (7, 3, 5):
        worker.add(decode_job(count, lambda count=count: done.append(count)))  # type: ignore[misc]
    for expected in (3, 2, 2):
        worker.plan(0.0)
        assert worker.max_steps() == expected
        worker.apply(expected)
    assert done == [3, 5, 7] and not worker.has_work()


def test_the_time_of_a_run_is_the_sum_of_its_steps() -> None:
    cost, worker = StepCost(0.5, 0.25, 0.125), DecodeWorker(StepCost(0.5, 0.25, 0.125))
    for context in (10, 30):
        worker.add(decode_job(20, num_context=context))
    run_steps(worker, 4)
    expected = sum(cost.step_s(2, 40 + 2 * (4 + step)) for step in range(6))
    worker.plan(0.0)
    assert worker.duration_s(6) == pytest.approx(expected)


def test_a_sequence_counts_its_tokens_from_the_step_that_it_joined() -> None:
    worker, first, second = DecodeWorker(COST), decode_job(20), decode_job(20)
    worker.add(first)
    run_steps(worker, 6)
    worker.add(second)
    assert second.joined_at == -1
    run_steps(worker, 3)
    assert (worker.num_tokens(first), worker.num_tokens(second), second.joined_at) == (9, 3, 6)


def test_a_check_ends_a_run_and_is_repeated_when_it_is_scheduled_again() -> None:
    worker, checked_after = DecodeWorker(COST), list[int]()
    waits = iter([4, 6, None])

    def check() -> None:
        checked_after.append(worker.num_tokens(job))
        worker.schedule_check(job)

    job = DecodeJob(10, 100, nothing, lambda: next(waits), check)
    worker.add(job)
    for expected in (4, 6, 90):
        worker.plan(0.0)
        assert worker.max_steps() == expected
        worker.apply(expected)
    assert checked_after == [4, 10]


def test_a_check_that_is_due_at_once_comes_after_one_step() -> None:
    worker = DecodeWorker(COST)
    worker.add(DecodeJob(10, 100, nothing, lambda: 0, nothing))
    worker.plan(0.0)
    assert worker.max_steps() == 1


def test_a_removed_sequence_is_not_in_later_steps_and_does_not_end() -> None:
    worker, done = DecodeWorker(StepCost(0.0, 1.0, 1.0)), list[str]()
    removed, other = decode_job(5, lambda: done.append("removed")), decode_job(8, lambda: done.append("other"))
    worker.add(removed)
    worker.add(other)
    run_steps(worker, 2)
    worker.remove(removed)
    assert removed.is_removed
    worker.plan(0.0)
    assert worker.max_steps() == 6 and worker.duration_s(1) == 1 + 12
    worker.apply(6)
    assert done == ["other"] and not worker.has_work()


def test_a_check_may_remove_the_sequence() -> None:
    worker = DecodeWorker(COST)
    job = DecodeJob(10, 100, nothing, lambda: 3, lambda: worker.remove(job))
    worker.add(job)
    run_steps(worker, 3)
    assert job.is_removed and not worker.has_work()


def test_a_sequence_that_ends_when_a_check_is_due_is_not_checked() -> None:
    worker, calls = DecodeWorker(COST), list[str]()
    worker.add(DecodeJob(10, 3, lambda: calls.append("done"), lambda: 3, lambda: calls.append("check")))
    run_steps(worker, 3)
    assert calls == ["done"]


# Device


def test_runs_of_steps_take_as_long_as_single_steps() -> None:
    cost, rng = StepCost(0.003, 0.0007, 1e-6), random.Random(4)
    jobs = sorted((rng.uniform(0, 2), rng.randint(1, 500), rng.randint(1, 120)) for _ in range(40))
    timeline, worker, ends = Timeline(), DecodeWorker(cost), [0.0] * len(jobs)
    device = Device(timeline, [worker])

    def end(index: int) -> None:
        ends[index] = timeline.now_s

    def arrive(index: int) -> None:
        _, context, count = jobs[index]
        worker.add(decode_job(count, lambda: end(index), context))
        device.wake()

    for index, (at_s, *_) in enumerate(jobs):
        timeline.at(at_s, lambda index=index: arrive(index))  # type: ignore[misc]
    timeline.run()
    assert ends == pytest.approx(ends_of_single_steps(cost, jobs))
    assert timeline.num_events < sum(count for *_, count in jobs)


def test_a_device_without_work_is_idle() -> None:
    recorder = Recorder()
    recorder.device.wake()
    recorder.timeline.run()
    assert recorder.device.busy_s == 0.0 and recorder.timeline.num_events == 0


def test_the_device_is_busy_while_it_computes_and_idle_between() -> None:
    recorder = Recorder()
    recorder.decode_at(1.0, "first", 5)
    recorder.decode_at(3.0, "second", 7)
    recorder.timeline.run()
    assert recorder.ended_at_s == pytest.approx({"first": 1.05, "second": 3.07})
    assert recorder.device.busy_s == pytest.approx(12 * STEP_S)


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


def test_workers_with_work_take_turns() -> None:
    recorder = Recorder(num_prefill=2)
    recorder.prefill_at(0.0, "a", 300, worker=0)
    recorder.prefill_at(0.0, "b", 300, worker=1)
    recorder.decode_at(0.0, "c", 3)
    recorder.timeline.run()
    assert recorder.ended_at_s == pytest.approx({"a": 0.07, "b": 0.08, "c": 0.09})


def test_delays_are_added_to_each_step_and_to_each_change_of_the_worker() -> None:
    recorder = Recorder(Delays(step_s=0.1, turn_s=1.0))
    recorder.decode_at(0.0, "a", 3)
    recorder.decode_at(100.0, "b", 3)  # the same worker: no turn
    recorder.prefill_at(200.0, "c", 50)
    recorder.timeline.run()
    step_s = STEP_S + 0.1
    assert recorder.ended_at_s == pytest.approx({"a": 1 + 3 * step_s, "b": 100 + 3 * step_s, "c": 201 + step_s})


def test_a_worker_that_may_not_keep_its_grant_computes_single_steps() -> None:
    def always_recalled(
        waiting: Collection[Demand], computing: Collection[Demand], last_granted: int
    ) -> frozenset[int]:
        return frozenset() if computing else slots_of(waiting)

    timeline, worker = Timeline(), DecodeWorker(COST)
    device = Device(timeline, [worker], policy=always_recalled)
    worker.add(decode_job(50))
    device.wake()
    timeline.run()
    assert timeline.num_events == 50 and timeline.now_s == pytest.approx(0.5)


def test_the_arbiter_sees_the_roles_of_the_workers_with_work() -> None:
    seen = list[list[tuple[int, Role]]]()

    def policy(waiting: Collection[Demand], computing: Collection[Demand], last_granted: int) -> frozenset[int]:
        seen.append([(demand.slot, demand.role) for demand in waiting])
        return slots_of([*computing, *waiting][:1])

    timeline, prefill, decode = Timeline(), prefill_worker(), DecodeWorker(COST)
    device = Device(timeline, [prefill, decode], policy=policy)
    decode.add(decode_job(1))
    device.wake()
    timeline.run()
    assert seen[0] == [(1, Role.DECODE)] and seen[-1] == []
    prefill.add(prefill_job(1))
    decode.add(decode_job(1))
    seen.clear()
    device.wake()
    assert seen[0] == [(0, Role.PREFILL), (1, Role.DECODE)]


def test_work_added_by_a_callback_at_the_end_of_a_run_is_in_the_next_step() -> None:
    recorder = Recorder()

    def follow_up() -> None:
        recorder.decode.add(decode_job(2, recorder._end("second")))
        recorder.device.wake()

    recorder.decode.add(decode_job(3, follow_up))
    recorder.device.wake()
    recorder.timeline.run()
    assert recorder.ended_at_s == pytest.approx({"second": 0.05})


def test_a_check_during_a_run_is_made_at_the_end_of_the_current_step() -> None:
    recorder, checked_at_s = Recorder(), list[float]()
    job = DecodeJob(10, 100, nothing, lambda: None, lambda: checked_at_s.append(recorder.timeline.now_s))
    recorder.decode.add(job)
    recorder.device.wake()

    def check() -> None:
        recorder.decode.check_soon(job)
        recorder.device.wake()

    recorder.timeline.at(0.234, check)
    recorder.timeline.run()
    assert checked_at_s == [pytest.approx(0.24)] and recorder.timeline.now_s == pytest.approx(1.0)
