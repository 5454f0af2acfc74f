"""Runs of decode steps: which are planned, how their tokens are applied, and that no token depends on their length."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.config.model_config import SimProfile
from muxmesh.engine.api import EngineJob, Event, Failed, Finished, JobDone, Preempted, Tokens
from muxmesh.engine.scheduler import Scheduler
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.engine.sim_runner import SimRunner
from muxmesh.engine.step import SampledToken, Step, StepOutcome
from muxmesh.errors import SequenceFailed
from muxmesh.types import (
    Candidate,
    EngineRequest,
    Finish,
    FinishReason,
    Sampling,
    SchedulingState,
    Stopping,
    TokenLogprobs,
)

EOS, STOP, BLOCK_SIZE, VOCAB_SIZE = 0, 40, 8, 1000


def decoding(
    job_id: int = 1, stopping: Stopping | None = None, sampling: Sampling | None = None, free: int = 100, **more: Any
) -> EngineJob:
    """A job with 5 prompt tokens and one output token, whose blocks have ``free`` slots beyond these."""
    num_tokens = 6
    blocks = tuple(range(-(-(num_tokens + free) // BLOCK_SIZE)))
    request = EngineRequest(
        f"r{job_id}", "m", tuple(range(50, 55)), sampling or Sampling(seed=job_id), stopping or Stopping(50),
        SchedulingState(0, float(job_id)),
    )  # fmt: skip
    return EngineJob(job_id, SequenceRecord(request, BLOCK_SIZE, b"", blocks, 5, (60,)), **more)


def scheduler(*jobs: EngineJob, max_num_seqs: int = 8) -> Scheduler:
    made = Scheduler(max_num_seqs, 64, VOCAB_SIZE)
    for job in jobs:
        made.add(job)
    return made


def planned(jobs: Scheduler, max_steps: int = 16) -> int:
    step = jobs.next_step(0.0, max_steps)
    assert step is not None
    return step.num_steps


def tokens(*token_ids: int) -> tuple[SampledToken, ...]:
    return tuple(map(SampledToken, token_ids))


def test_decode_steps_run_in_a_row_as_far_as_they_may() -> None:
    assert planned(scheduler(decoding(1), decoding(2))) == 16
    assert planned(scheduler(decoding(1), decoding(2)), max_steps=1) == 1


def test_a_step_with_a_prompt_is_a_single_one() -> None:
    prompt = EngineJob(2, SequenceRecord(decoding().sequence.request, BLOCK_SIZE, b"", tuple(range(20))))
    jobs = scheduler(decoding(1), prompt)
    step = jobs.next_step(0.0, 16)
    assert step is not None and (len(step.chunks), step.num_steps) == (2, 1)


def test_a_job_that_waits_for_a_slot_does_not_shorten_a_run() -> None:
    jobs = scheduler(decoding(1), decoding(2), decoding(3), max_num_seqs=2)
    assert planned(jobs) == 16


def test_a_prompt_that_waits_ends_the_runs() -> None:
    prompt = EngineJob(3, SequenceRecord(decoding().sequence.request, BLOCK_SIZE, b"", tuple(range(20))))
    assert planned(scheduler(decoding(1), decoding(2), prompt, max_num_seqs=2)) == 1


def test_a_job_that_cannot_run_does_not_shorten_a_run() -> None:
    without_a_slot = decoding(3, free=2)
    without_a_slot.sequence.extend((7, 8, 9))
    jobs = scheduler(decoding(1), decoding(2), without_a_slot)
    jobs.preempt(2)
    assert planned(jobs) == 16


@pytest.mark.parametrize(
    ("job", "num_steps"),
    [
        (decoding(stopping=Stopping(8)), 7),
        (decoding(stopping=Stopping(2)), 1),
        (decoding(max_new_tokens=3), 3),
        (decoding(stopping=Stopping(4), max_new_tokens=5), 3),
        (decoding(free=10), 11),
        (decoding(free=2), 3),
        (decoding(stopping=Stopping(50, min_new_tokens=6, eos_token_ids=frozenset({0}))), 4),
        (decoding(stopping=Stopping(50, min_new_tokens=2, eos_token_ids=frozenset({0}))), 16),
        (decoding(stopping=Stopping(50, min_new_tokens=6)), 16),
        (decoding(sampling=Sampling(frequency_penalty=0.5)), 16),
        (decoding(sampling=Sampling(allowed_token_ids=(5, 6), logit_bias=((5, 1.0),), logprobs=3)), 16),
    ],
    ids=[
        "the longest output", "one more token", "the job's limit", "the smaller of both", "the slots of its blocks",
        "the slots of its last block", "the tokens that are banned so far", "bans that are over",
        "a minimum without end tokens", "penalties",
        "constant conditions and log-probabilities",
    ],
)  # fmt: skip
def test_a_run_ends_where_a_sequence_needs_the_host(job: EngineJob, num_steps: int) -> None:
    assert planned(scheduler(decoding(9), job)) == num_steps


def test_a_sequence_whose_bitmask_the_host_computes_has_single_steps() -> None:
    masked = decoding()
    masked.sequence.token_bitmask = np.array([5], dtype=np.uint32)
    assert planned(scheduler(masked)) == 1


def test_the_tokens_of_a_run_are_one_event_and_all_but_the_last_are_computed() -> None:
    job = decoding()
    jobs = scheduler(job)
    jobs.next_step(0.0, 4)
    logprobs = [TokenLogprobs(Candidate(token, -0.5, 1)) for token in (7, 8, 9)]
    jobs.apply(StepOutcome({1: tuple(map(SampledToken, (7, 8, 9), logprobs))}, num_steps=3), run_s=0.75)
    assert jobs.drain_events() == [(1, Tokens(1, (7, 8, 9), tuple(logprobs)))]
    assert (job.sequence.num_computed_tokens, job.sequence.num_tokens) == (8, 9)
    assert job.sequence.computing_s == 0.75


@pytest.mark.parametrize(
    ("job", "end"),
    [
        (decoding(stopping=Stopping(50, eos_token_ids=frozenset({8}))), Finished(Finish(FinishReason.EOS, 8))),
        (decoding(stopping=Stopping(50, stop_token_ids=frozenset({8}))), Finished(Finish(FinishReason.STOP_TOKEN, 8))),
        (decoding(stopping=Stopping(3)), Finished(Finish(FinishReason.LENGTH))),
        (decoding(max_new_tokens=2), JobDone()),
    ],
)
def test_tokens_after_the_end_of_a_sequence_are_dropped_and_do_not_count_as_computed(
    job: EngineJob, end: Event
) -> None:
    jobs = scheduler(job, decoding(2))
    jobs.next_step(0.0, 4)
    jobs.apply(StepOutcome({1: tokens(7, 8, 9, 9), 2: tokens(7, 8, 9, 9)}, num_steps=4), run_s=1.0)
    assert jobs.drain_events() == [(1, Tokens(1, (7, 8))), (1, end), (2, Tokens(1, (7, 8, 9, 9)))]
    assert (job.sequence.num_computed_tokens, job.sequence.num_tokens, job.sequence.computing_s) == (7, 8, 0.5)
    job.sequence.check_integrity()


def test_a_sequence_that_fails_in_the_middle_keeps_the_tokens_before() -> None:
    job, failed = decoding(), Failed("not finite", SequenceFailed)
    jobs = scheduler(job, decoding(2))
    jobs.next_step(0.0, 4)
    jobs.apply(StepOutcome({1: tokens(7, 8), 2: tokens(7, 8, 9)}, failed={1: failed}, num_steps=3))
    assert jobs.drain_events() == [(1, Tokens(1, (7, 8))), (1, failed), (2, Tokens(1, (7, 8, 9)))]
    assert job.sequence.num_computed_tokens == 7


def test_a_failure_after_the_end_of_a_sequence_has_no_effect() -> None:
    jobs = scheduler(decoding(stopping=Stopping(50, eos_token_ids=frozenset({8}))))
    jobs.next_step(0.0, 4)
    jobs.apply(StepOutcome({1: tokens(7, 8)}, failed={1: Failed("not finite")}, num_steps=4))
    assert jobs.drain_events()[1:] == [(1, Finished(Finish(FinishReason.EOS, 8)))]


def test_a_token_in_the_middle_that_the_model_does_not_have_fails_its_sequence() -> None:
    jobs = scheduler(decoding())
    jobs.next_step(0.0, 4)
    jobs.apply(StepOutcome({1: tokens(7, VOCAB_SIZE, 9)}, num_steps=3))
    (first, (_, failed)) = jobs.drain_events()
    assert first == (1, Tokens(1, (7,)))
    assert isinstance(failed, Failed) and "the runner sampled token id 1000" in failed.reason


def test_jobs_that_are_pre_empted_or_cancelled_meanwhile_are_so_at_the_end_of_the_run() -> None:
    jobs = scheduler(decoding(1), decoding(2))
    jobs.next_step(0.0, 4)
    jobs.preempt(1)
    assert jobs.cancel(2)
    assert jobs.drain_events() == []
    jobs.apply(StepOutcome({1: tokens(7, 8), 2: tokens(7, 8)}, num_steps=2))
    assert jobs.drain_events() == [(1, Tokens(1, (7, 8))), (1, Preempted())]


def test_the_sim_runner_asks_before_each_further_step() -> None:
    step = scheduler(decoding(1), decoding(2)).next_step(0.0, 6)
    assert step is not None
    slept_s: list[float] = []
    runner = SimRunner(SimProfile(per_context_s=1.0), range(35, 93), EOS, slept_s.append, max_steps=6)
    answers = iter((True, True, False))
    outcome = runner.run(step, lambda: next(answers))
    assert (outcome.num_steps, [len(one) for one in outcome.sampled.values()]) == (3, [3, 3])
    assert slept_s == [10.0, 12.0, 14.0], "each step attends to one more token of each sequence"
    shape = step.mean_shape(3)
    assert (shape.num_tokens, shape.num_context, shape.num_seqs) == (2, 12, 2)
    assert runner.run(step).num_steps == 6


@dataclass
class Model:
    """What a sequence is, and where it fails: at the output index ``fails_at``, -1 for never."""

    num_prompt_tokens: int
    max_new_tokens: int
    min_new_tokens: int
    has_stop_token: bool
    has_penalties: bool
    seed: int
    limit: int | None
    fails_at: int

    def record(self, job_id: int, num_blocks: int) -> SequenceRecord:
        stops = frozenset({STOP}) if self.has_stop_token else frozenset[int]()
        request = EngineRequest(
            f"r{job_id}",
            "m",
            tuple(range(100, 100 + self.num_prompt_tokens)),
            Sampling(seed=self.seed, presence_penalty=0.1 * self.has_penalties),
            Stopping(self.max_new_tokens, min(self.min_new_tokens, self.max_new_tokens), stops, frozenset({EOS})),
            SchedulingState(0, float(job_id)),
        )
        needed = -(-self.num_prompt_tokens // BLOCK_SIZE)
        return SequenceRecord(request, BLOCK_SIZE, b"", _blocks(job_id, 0, max(needed, num_blocks)))


MODELS = st.builds(
    Model,
    st.integers(1, 20),
    st.integers(1, 30),
    st.integers(0, 12),
    st.booleans(),
    st.booleans(),
    st.integers(0, 5),
    st.none() | st.integers(1, 20),
    st.just(-1) | st.integers(0, 12),
)


def _blocks(job_id: int, first: int, end: int) -> tuple[int, ...]:
    return tuple(range(1000 * job_id + first, 1000 * job_id + end))


class KvRunner:
    """A `Runner` that remembers which token it wrote into each slot, and reads the slots that attention would read.

    A sequence that fails is computed until the end of the run, as a device does.
    """

    max_steps = 64

    def __init__(self, fails_at: dict[int, int], sequences: dict[int, SequenceRecord]) -> None:
        self._sim = SimRunner(SimProfile(output_tokens=12, output_lengths="geometric"), range(35, 60), EOS)
        self._fails_at = fails_at
        self._sequences = sequences
        self.slots: dict[tuple[int, int], int] = {}
        """(block id, offset) → the token whose KV is there."""

    def unload(self, drop_weights: bool) -> None: ...

    def load(self) -> None: ...

    def run(self, step: Step, may_continue: Callable[[], bool]) -> StepOutcome:
        sampled: dict[int, list[SampledToken]] = {}
        failed: dict[int, Failed] = {}
        for num_steps in count(1):
            self._write_and_read(step)
            for job_id, (token,) in self._sim.run(Step(step.chunks)).sampled.items():
                chunk = next(chunk for chunk in step.chunks if chunk.job_id == job_id)
                if chunk.sample and chunk.sample.output_index == self._fails_at[job_id]:
                    failed[job_id] = Failed("not finite", SequenceFailed)
                sampled.setdefault(job_id, [])
                if job_id not in failed:
                    sampled[job_id].append(token)
            if num_steps == step.num_steps or not may_continue():
                break
            following = (
                chunk.following(sampled[chunk.job_id][-1].token_id if chunk.job_id not in failed else 0)
                for chunk in step.chunks
            )
            step = Step(tuple(following), step.num_steps)
        return StepOutcome({job_id: tuple(row) for job_id, row in sampled.items()}, failed=failed, num_steps=num_steps)

    def _write_and_read(self, step: Step) -> None:
        for chunk in step.chunks:
            for position, token in enumerate(chunk.token_ids, chunk.start):
                self.slots[self._slot(chunk.block_ids, position)] = token
            known = self._sequences[chunk.job_id].tokens(0, chunk.start)
            read = [self.slots[self._slot(chunk.block_ids, position)] for position in range(len(known))]
            assert read == list(known), "attention reads the KV of the sequence's own tokens"

    @staticmethod
    def _slot(block_ids: tuple[int, ...], position: int) -> tuple[int, int]:
        return block_ids[position // BLOCK_SIZE], position % BLOCK_SIZE


@dataclass
class Served:
    """Jobs on one scheduler, with the events of each."""

    jobs: Scheduler
    runner: KvRunner
    max_steps: int
    sequences: dict[int, SequenceRecord]
    events: dict[int, list[Event]] = field(default_factory=dict)

    def step(
        self, may_continue: Callable[[], bool] = lambda: True, meanwhile: Callable[[], None] = lambda: None
    ) -> int:
        """Plans, computes and applies a run of steps; ``meanwhile`` is called while it is in flight."""
        step = self.jobs.next_step(0.0, self.max_steps)
        if step is not None:
            outcome = self.runner.run(step, may_continue)
            meanwhile()
            self.jobs.apply(outcome, float(outcome.num_steps))
        for job_id, event in self.jobs.drain_events():
            self.events.setdefault(job_id, []).append(event)
        return 0 if step is None else outcome.num_steps

    def output(self, job_id: int) -> tuple[int, ...]:
        """The tokens of the job's events, each once and in order."""
        found: list[int] = []
        for event in self.events.get(job_id, []):
            if isinstance(event, Tokens):
                assert event.start_index == len(found)
                found.extend(event.token_ids)
        return tuple(found)

    def ends(self, job_id: int) -> list[Event]:
        return [event for event in self.events.get(job_id, []) if isinstance(event, JobDone | Finished | Failed)]


def serve(models: dict[int, Model], num_blocks: int, max_steps: int, max_num_seqs: int) -> Served:
    sequences = {job_id: model.record(job_id, num_blocks) for job_id, model in models.items()}
    runner = KvRunner({job_id: model.fails_at for job_id, model in models.items()}, sequences)
    return Served(Scheduler(max_num_seqs, 16, VOCAB_SIZE), runner, max_steps, sequences)


def alone(job_id: int, model: Model) -> tuple[tuple[int, ...], list[Event]]:
    """The output and the last event of a job that is computed alone, step by step, in blocks for all its tokens."""
    served = serve({job_id: model}, 10, 1, 1)
    served.jobs.add(EngineJob(job_id, served.sequences[job_id], model.limit))
    while served.jobs.has_work():
        assert served.step() == 1
    return served.output(job_id), served.ends(job_id)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["step", "step", "add", "cancel", "preempt", "resume", "grow"]), st.integers(1, 5)),
    max_size=60,
)


@given(
    st.lists(MODELS, min_size=1, max_size=5), OPERATIONS, st.integers(1, 20), st.integers(1, 6), st.integers(0, 4),
    st.lists(st.booleans(), min_size=1),
)  # fmt: skip
def test_no_token_depends_on_the_length_of_runs(
    listed: list[Model], operations: list[tuple[str, int]], max_steps: int, max_num_seqs: int, blocks: int,
    answers: list[bool],
) -> None:  # fmt: skip
    models = dict(enumerate(listed, 1))
    served = serve(models, blocks, max_steps, max_num_seqs)
    waiting, cancelled = set(models), set[int]()
    asked = count()

    def operate(name: str, job_id: int) -> None:
        sequence = served.sequences.get(job_id)
        if sequence is None:
            return
        if name == "add" and job_id in waiting:
            waiting.discard(job_id)
            served.jobs.add(EngineJob(job_id, sequence, models[job_id].limit))
        elif name == "cancel" and job_id not in waiting:
            cancelled.add(job_id)
            served.jobs.cancel(job_id)
        elif name == "preempt":
            served.jobs.preempt(job_id)
        elif name == "resume":
            served.jobs.resume(job_id)
        elif name == "grow":
            sequence.add_blocks(_blocks(job_id, len(sequence.block_ids), len(sequence.block_ids) + 1))

    for index, (name, job_id) in enumerate(operations):
        if name == "step":
            meanwhile = operations[index + 1] if index + 1 < len(operations) else ("step", 0)
            served.step(lambda: answers[next(asked) % len(answers)], functools.partial(operate, *meanwhile))
        else:
            operate(name, job_id)
    for job_id in models:
        operate("add", job_id)
        operate("resume", job_id)
    while any(not served.ends(job_id) for job_id in models if job_id not in cancelled):
        for job_id, sequence in served.sequences.items():
            if sequence.num_free_slots < 0:
                operate("grow", job_id)
        assert served.step() > 0
    for job_id, model in models.items():
        expected, end = alone(job_id, model)
        output, sequence = served.output(job_id), served.sequences[job_id]
        if job_id in cancelled:
            assert output == expected[: len(output)]
        else:
            assert (output, served.ends(job_id)) == (expected, end)
        assert sequence.output_token_ids == output
        sequence.check_integrity()
        known = sequence.tokens(0, sequence.num_computed_tokens)
        slots = [served.runner.slots[KvRunner._slot(sequence.block_ids, position)] for position in range(len(known))]
        assert slots == list(known), "what counts as computed is the KV of the sequence's tokens"
