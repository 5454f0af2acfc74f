import math
import random
from collections.abc import Callable

import pytest

from muxmesh.engine.api import ComputeDemand
from muxmesh.remaining_work import RemainingWork
from muxmesh.scheduling_policy import SchedulingPolicy
from muxmesh.step_cost import StepCost
from muxmesh.types import LengthPrediction, SchedulingState
from simulator.simulated_workers import DecodeJob, DecodeWorker, PrefillJob, PrefillWorker
from simulator.step_times import LinearStepTimes
from tests.support.simulated_workers import STEP_S, decode_job, decode_worker, nothing, prefill_job, prefill_worker


def run_steps(worker: DecodeWorker, num_steps: int) -> None:
    worker.plan(0.0)
    assert num_steps <= worker.max_steps()
    worker.apply(num_steps)


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


# DecodeWorker


def test_a_run_of_decode_steps_lasts_until_the_first_sequence_ends() -> None:
    worker, done = decode_worker(), list[int]()
    for count in (7, 3, 5):
        worker.add(decode_job(count, lambda count=count: done.append(count)))  # type: ignore[misc]
    for expected in (3, 2, 2):
        worker.plan(0.0)
        assert worker.max_steps() == expected
        worker.apply(expected)
    assert done == [3, 5, 7] and not worker.has_work()


def test_the_time_of_a_run_is_the_sum_of_its_steps() -> None:
    cost, worker = StepCost(0.5, 0.25, 0.125), decode_worker(StepCost(0.5, 0.25, 0.125))
    for context in (10, 30):
        worker.add(decode_job(20, num_context=context))
    run_steps(worker, 4)
    expected = sum(cost.step_s(2, 40 + 2 * (4 + step)) for step in range(6))
    worker.plan(0.0)
    assert worker.duration_s(6) == pytest.approx(expected)


def test_a_sequence_counts_its_tokens_from_the_step_that_it_joined() -> None:
    worker, first, second = decode_worker(), decode_job(20), decode_job(20)
    worker.add(first)
    run_steps(worker, 6)
    worker.add(second)
    assert second.joined_at == -1
    run_steps(worker, 3)
    assert (worker.num_tokens(first), worker.num_tokens(second), second.joined_at) == (9, 3, 6)


def test_a_check_ends_a_run_and_is_repeated_when_it_is_scheduled_again() -> None:
    worker, checked_after = decode_worker(), list[int]()
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
    worker = decode_worker()
    worker.add(DecodeJob(10, 100, nothing, lambda: 0, nothing))
    worker.plan(0.0)
    assert worker.max_steps() == 1


def test_a_removed_sequence_is_not_in_later_steps_and_does_not_end() -> None:
    worker, done = decode_worker(StepCost(0.0, 1.0, 1.0)), list[str]()
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
    worker = decode_worker()
    job = DecodeJob(10, 100, nothing, lambda: 3, lambda: worker.remove(job))
    worker.add(job)
    run_steps(worker, 3)
    assert job.is_removed and not worker.has_work()


def test_a_sequence_that_ends_when_a_check_is_due_is_not_checked() -> None:
    worker, calls = decode_worker(), list[str]()
    worker.add(DecodeJob(10, 3, lambda: calls.append("done"), lambda: 3, lambda: calls.append("check")))
    run_steps(worker, 3)
    assert calls == ["done"]


def test_a_worker_with_a_part_of_the_device_takes_longer() -> None:
    prefill, decode = prefill_worker(share=0.5), decode_worker(share=0.25)
    prefill.add(prefill_job(10))
    decode.add(decode_job(5))
    prefill.plan(0.0)
    decode.plan(0.0)
    assert (prefill.duration_s(1), decode.duration_s(5)) == pytest.approx((2 * STEP_S, 4 * 5 * STEP_S))


def test_a_worker_demands_for_the_best_class_and_the_oldest_request() -> None:
    prefill, decode = prefill_worker(), decode_worker()
    for priority, arrived_at_s in ((0, 5.0), (2, 1.0), (-1, 7.0)):
        prefill.add(PrefillJob(SchedulingState(priority, arrived_at_s), 0, 10, nothing))
        job = decode_job(priority + 2)
        job.work = RemainingWork(SchedulingState(priority, arrived_at_s), None)
        decode.add(job)
    assert prefill.demand(9.0) == decode.demand(9.0) == ComputeDemand(-1, 1.0)
    run_steps(decode, 1)  # the job of the best class ends
    assert decode.demand(9.0) == ComputeDemand(0, 1.0)
    decode.apply(1)
    assert decode.demand(9.0) == ComputeDemand(2, 1.0)


def test_a_prompt_has_to_begin_so_long_before_its_token_is_due_as_it_takes() -> None:
    worker = prefill_worker(StepCost(0.0, 0.01, 0.0))
    assert prefill_demand(worker, due_at_s=math.inf).slack_s == math.inf
    worker.plan(0.0)
    worker.apply(1)  # 0.01 s for each of its tokens
    assert prefill_demand(worker, due_at_s=5.0).slack_s == pytest.approx(5.0 - 1.0 - 100 * 0.01)
    assert prefill_demand(worker, due_at_s=0.9).slack_s == pytest.approx(5.0 - 1.0 - 100 * 0.01)  # that one is lost


def prefill_demand(worker: PrefillWorker, due_at_s: float) -> ComputeDemand:
    """What a worker with a further prompt of 100 tokens demands one second after its arrival."""
    worker.add(PrefillJob(SchedulingState(0, 0.0), 0, 100, nothing, due_at_s))
    return worker.demand(1.0)


def test_each_token_of_a_sequence_is_due_its_tpot_after_the_one_before() -> None:
    worker, job = decode_worker(), decode_job(10)
    job.due_at_s, job.tpot_s, job.lost_after_s = 3.0, 0.5, 2.0
    worker.add(job)
    assert worker.demand(1.0).slack_s == pytest.approx(2.0)
    run_steps(worker, 4)
    assert worker.next_due_s(job) == worker.demand(1.0).slack_s + 1.0 == pytest.approx(5.0)
    late, missed = worker.demand(6.0), worker.demand(7.5)
    assert (late.slack_s, late.lost_s) == pytest.approx((-1.0, 1.0)), "it can catch up"
    assert (missed.slack_s, missed.lost_s) == pytest.approx((-0.5, -0.5))
    worker.add(decode_job(10))
    assert worker.demand(1.0).slack_s == pytest.approx(4.0)
    worker.remove(job)
    assert worker.demand(1.0).slack_s == math.inf


# More sequences than the batch holds


def small_batch(max_num_seqs: int = 1) -> DecodeWorker:
    return DecodeWorker(LinearStepTimes(StepCost(0.0, 1.0, 1.0)), "m", 1.0, SRTF, max_num_seqs)


SRTF = SchedulingPolicy("srtf", 0.0, 0.0, 1.0)


def predicted_job(
    num_left: int, remaining_s: float, done: Callable[[], None] = nothing, priority: int = 0, length: float = 1000.0
) -> DecodeJob:
    state = SchedulingState(priority, 0.0, decode_s=remaining_s)
    return DecodeJob(10, num_left, done, lambda: None, nothing, RemainingWork(state, LengthPrediction(length, length)))


def test_a_displaced_sequence_continues_where_it_was() -> None:
    worker, done = small_batch(), list[str]()
    long = predicted_job(20, 100.0, lambda: done.append("long"))
    worker.add(long)
    run_steps(worker, 6)
    worker.add(predicted_job(3, 2.0, lambda: done.append("short")))
    worker.plan(0.0)
    assert (long.is_batched, long.num_preemptions, worker.num_tokens(long)) == (False, 1, 6)
    assert worker.duration_s(1) == 1 + 10, "one sequence and its context"
    assert worker.max_steps() == 1, "another one may displace what is left of the batch"
    worker.apply(1)
    run_steps(worker, 2)
    assert done == ["short"] and worker.num_tokens(long) == 6
    worker.plan(0.0)
    assert worker.max_steps() == 14 and worker.duration_s(1) == 1 + 16
    worker.apply(14)
    assert done == ["short", "long"] and not worker.has_work()


def test_the_checks_of_a_displaced_sequence_wait_too() -> None:
    worker, checked_after = small_batch(), list[int]()
    state = SchedulingState(0, 0.0, decode_s=100.0)
    job = DecodeJob(
        10, 50, nothing, lambda: 10 - worker.num_tokens(job), lambda: checked_after.append(worker.num_tokens(job)),
        RemainingWork(state, LengthPrediction(1000.0, 1000.0)),
    )  # fmt: skip
    worker.add(job)
    run_steps(worker, 6)
    worker.add(predicted_job(8, 2.0))
    run_steps(worker, 1)
    run_steps(worker, 7)
    assert checked_after == []
    run_steps(worker, 4)
    assert checked_after == [10]


def test_a_sequence_without_a_slot_waits_and_may_be_removed() -> None:
    worker = small_batch()
    waiting = predicted_job(9, 90.0)
    worker.add(predicted_job(3, 80.0))
    worker.add(waiting)
    run_steps(worker, 1)
    assert not waiting.is_batched and worker.num_tokens(waiting) == 0
    worker.remove(waiting)
    run_steps(worker, 2)
    assert not worker.has_work()


def test_a_new_prediction_ends_a_run_while_a_sequence_waits() -> None:
    worker = small_batch()
    worker.add(predicted_job(400, 80.0, length=100.0))
    worker.plan(0.0)
    assert worker.max_steps() == 400
    worker.add(predicted_job(9, 70.0))
    worker.plan(0.0)
    assert worker.max_steps() == 25, "a quarter of the predicted length"


def test_a_better_class_is_in_the_next_step() -> None:
    worker = small_batch(max_num_seqs=2)
    for _ in range(2):
        worker.add(predicted_job(50, 1.0))
    run_steps(worker, 5)
    urgent = predicted_job(50, 99.0, priority=-1)
    worker.add(urgent)
    worker.plan(0.0)
    assert urgent.is_batched


# Progress


def test_a_sequence_has_progress_when_it_joins_when_its_work_is_updated_and_when_it_is_nearly_done() -> None:
    worker, steps = small_batch(2), list[int]()
    worker.add(predicted_job(500, 80.0, length=100.0))
    worker.add(decode_job(500))
    for step in range(120):
        run_steps(worker, 1)
        steps += [step + 1] * any(job.num_left == 500 and job.work.expected_tokens < 500 for job in worker.changed(0.0))
    updates = [1, 17, 25, 41, 50, 66, 80, 82, 98, 100, 116]
    assert steps == updates, "every 16 tokens, at 25, 50 and 100 % of the prediction, and at 80 % of what is expected"


def test_a_sequence_has_progress_when_it_is_displaced_and_none_once_it_is_removed() -> None:
    worker = small_batch()
    long, short = predicted_job(200, 100.0), predicted_job(3, 2.0)
    worker.note_change(long)
    assert worker.changed(0.0) == [long] and worker.changed(0.0) == []
    worker.add(long)
    run_steps(worker, 6)
    assert worker.changed(0.0) == [long]
    worker.add(short)
    run_steps(worker, 1)
    assert worker.changed(0.0) == [long, short] or worker.changed(0.0) == [short, long]
    run_steps(worker, 1)
    worker.remove(long)
    assert worker.changed(0.0) == []


def test_a_sequence_with_an_slo_always_has_progress() -> None:
    """Its slack changes with time."""
    worker, job = small_batch(), predicted_job(200, 100.0)
    job.due_at_s, job.tpot_s, job.lost_after_s = 5.0, 1.0, 100.0
    worker.add(job)
    run_steps(worker, 1)
    for now_s in (1.0, 2.0):
        assert worker.changed(now_s) == [job]
        assert job.slack_s == 6.0 - now_s


@pytest.mark.parametrize("seed", range(5))
def test_what_changed_returns_is_all_that_differs_from_a_look_at_every_sequence(seed: int) -> None:
    rng, worker, reported = random.Random(seed), small_batch(3), dict[int, tuple[object, ...]]()
    jobs: list[DecodeJob] = []

    def progress(job: DecodeJob) -> tuple[object, ...]:
        return job.is_displaced, job.scheduling, job.is_protected, job.num_preemptions

    for _ in range(300):
        if rng.random() < 0.15:
            length = rng.randint(5, 200)
            jobs.append(predicted_job(rng.randint(1, 200), float(length), length=float(length)))
            worker.note_change(jobs[-1])
            worker.add(jobs[-1])
        if worker.has_work():
            worker.plan(0.0)
            worker.apply(rng.randint(1, min(8, worker.max_steps())))
        if rng.random() < 0.5:
            reported |= {id(job): progress(job) for job in worker.changed(0.0)}
            for job in jobs:
                if not job.is_removed:
                    worker.update(job)
                    assert reported[id(job)] == progress(job)
    assert worker.num_displaced
