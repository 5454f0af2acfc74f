"""Random arrivals, cancels, pauses and lacking token blocks: what holds at every step of the scheduler."""

import random
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest

from muxmesh.batch_choice import MAX_CLASS_PREEMPTIONS
from muxmesh.engine.api import Batched, Displaced, EngineJob, Finished, Preempted, Tokens
from muxmesh.engine.scheduler import Scheduler
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.engine.step import SampledToken, StepOutcome
from muxmesh.scheduling_policy import PolicyName, SchedulingPolicy
from muxmesh.types import EngineRequest, LengthPrediction, Sampling, SchedulingState, Stopping

NUM_SLOTS, STEP_S = 4, 0.02
BLOCK_SIZE = 16


@dataclass
class Worker:
    """A scheduler with random jobs, and what its events have said of each."""

    scheduler: Scheduler
    rng: random.Random
    now_s: float = 0.0
    next_id: int = 1
    running: dict[int, SequenceRecord] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    num_tokens: Counter[int] = field(default_factory=Counter)
    displaced: set[int] = field(default_factory=set)
    paused: set[int] = field(default_factory=set)
    num_ended: int = 0
    num_preemptions: int = 0
    num_preemptions_of: Counter[str] = field(default_factory=Counter)
    """By request, over all of its attempts."""
    num_attempts: int = 0

    def arrive(self) -> None:
        """A sequence with its first output token; the prediction of its length is often wrong."""
        length = max(2, round(self.rng.lognormvariate(3, 1)))
        predicted = max(1.0, length * self.rng.lognormvariate(0, 0.7))
        request = EngineRequest(
            request_id=str(self.next_id),
            model="m",
            prompt_token_ids=(1, 2, 3),
            sampling=Sampling(),
            stopping=Stopping(max_new_tokens=length),
            scheduling=SchedulingState(
                self.rng.choice((0, 0, 0, -1, 1)), self.now_s, decode_s=predicted * STEP_S, mean_work_s=30 * STEP_S
            ),
            prediction=LengthPrediction(predicted, predicted * 2),
        )
        blocks = tuple(range(-(-(3 + length) // BLOCK_SIZE)))
        record = SequenceRecord(request, BLOCK_SIZE, b"root", blocks, 3, (7,))
        self.scheduler.add(EngineJob(self.next_id, record), self.now_s)
        self.running[self.next_id], self.lengths[self.next_id] = record, length
        self.num_tokens[self.next_id] = 1
        self.next_id += 1

    def disturb(self) -> None:
        """Cancels a sequence, pauses or resumes one, frees its KV, or takes or returns its token blocks."""
        if not self.running:
            return
        job_id = self.rng.choice(list(self.running))
        match self.rng.randrange(8):
            case 0:
                self.scheduler.cancel(job_id)
                self.forget(job_id)
            case 1:
                self.scheduler.preempt(job_id)
                self.read_events()
            case 2:
                self.scheduler.resume(job_id)
                self.paused.discard(job_id)
            case 3 | 4 | 5:
                self.compute_again(job_id)
            case _:
                record = self.running[job_id]
                record.block_ids = () if record.block_ids else tuple(range(100))

    def compute_again(self, job_id: int) -> None:
        """The KV of a sequence was freed and is computed again: it comes back as another job with its tokens."""
        record = self.running[job_id]
        scheduling = replace(record.request.scheduling, num_preemptions=record.num_preemptions)
        request = replace(record.request, resume_token_ids=record.output_token_ids, scheduling=scheduling)
        again = SequenceRecord(request, BLOCK_SIZE, b"root", tuple(range(100)), record.num_tokens - 1)
        self.scheduler.cancel(job_id)
        self.scheduler.add(EngineJob(self.next_id, again), self.now_s)
        self.running[self.next_id], self.lengths[self.next_id] = again, self.lengths[job_id]
        self.num_tokens[self.next_id] = self.num_tokens[job_id]
        self.forget(job_id)
        self.next_id += 1
        self.num_attempts += 1

    def settle(self) -> None:
        """Returns what sequences lack."""
        for job_id, record in self.running.items():
            self.scheduler.resume(job_id)
            record.block_ids = record.block_ids or tuple(range(100))
        self.paused.clear()

    def step(self) -> None:
        """Computes a step, and checks what holds of it."""
        self.now_s += STEP_S
        step = self.scheduler.next_step(self.now_s)
        if step is None:
            return
        computed = [chunk.job_id for chunk in step.chunks]
        assert len(computed) == len(set(computed)) <= NUM_SLOTS
        ready = [one for one, record in self.running.items() if record.num_free_slots >= 0 and one not in self.paused]
        assert len(computed) == min(NUM_SLOTS, len(ready)), "no slot is left free while a sequence waits"
        self.scheduler.apply(StepOutcome({job_id: (SampledToken(50),) for job_id in computed}), STEP_S)
        self.read_events()
        assert not set(computed) & self.displaced, "a sequence that is computed is not reported as displaced"
        for record in self.running.values():
            assert record.num_preemptions <= MAX_CLASS_PREEMPTIONS
            record.check_integrity()

    def read_events(self) -> None:
        for job_id, event in self.scheduler.drain_events():
            if isinstance(event, Tokens):
                assert event.start_index == self.num_tokens[job_id], "no token is lost or repeated"
                self.num_tokens[job_id] += len(event.token_ids)
            elif isinstance(event, Displaced):
                assert job_id not in self.displaced
                self.displaced.add(job_id)
                self.num_preemptions += event.reason is not None
                request_id = self.running[job_id].request.request_id
                self.num_preemptions_of[request_id] += event.reason is not None
                assert self.num_preemptions_of[request_id] <= MAX_CLASS_PREEMPTIONS, "over all attempts"
            elif isinstance(event, Batched):
                self.displaced.remove(job_id)
            elif isinstance(event, Preempted):
                self.paused.add(job_id)
                self.displaced.discard(job_id)
            elif isinstance(event, Finished):
                assert self.num_tokens[job_id] == self.lengths[job_id]
                self.num_ended += 1
                self.forget(job_id)

    def forget(self, job_id: int) -> None:
        del self.running[job_id]
        self.displaced.discard(job_id)
        self.paused.discard(job_id)


def walk(policy: PolicyName, num_steps: int, seed: int) -> Worker:
    """Runs a worker whose load goes up and down, until it is empty."""
    order = SchedulingPolicy(policy, 20.0, 1e9, 1.0, max_wait_s=30.0)
    rng = random.Random(seed)
    worker = Worker(Scheduler(NUM_SLOTS, 64, 1000, order), rng)
    for number in range(num_steps):
        busy = (number // 500) % 2
        if rng.random() < (0.15 if busy else 0.02) and len(worker.running) < 12:
            worker.arrive()
        if rng.random() < 0.05:
            worker.disturb()
        worker.step()
    worker.settle()
    for _ in range(20_000):
        if not worker.running:
            break
        worker.step()
    return worker


@pytest.mark.parametrize("policy", ["fcfs", "srtf", "srtf-aged", "hrrn"])
def test_no_sequence_is_lost_and_pre_emptions_are_bounded(policy: PolicyName) -> None:
    worker = walk(policy, 20_000, seed=1)
    assert worker.running == {}, "everything finishes"
    assert worker.num_ended > 500 and worker.num_preemptions > 20 and worker.num_attempts > 100


@pytest.mark.long
def test_a_long_walk_loses_nothing_either() -> None:
    worker = walk("srtf-aged", 200_000, seed=2)
    assert worker.running == {}
