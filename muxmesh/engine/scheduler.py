"""Decides which jobs run in the next step, and turns a step's outcome into events. Pure: no clock, no I/O, no tensor.

There is no prefill phase and no decode phase here, only sequences with tokens that are not computed yet
(`num_computed_tokens`, as in vLLM's scheduler): a prompt has many of them, a sequence that decodes has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from muxmesh.batch_choice import choose_batch
from muxmesh.engine.api import (
    Batched,
    ComputeDemand,
    Displaced,
    EngineJob,
    Event,
    Failed,
    Finished,
    JobDone,
    Preempted,
    PromptLogprobs,
    Tokens,
)
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.engine.step import Chunk, PromptScoring, SampledToken, SampleSpec, Step, StepOutcome
from muxmesh.engine.step_limit import StepLimit
from muxmesh.engine.token_budget import divide_token_budget
from muxmesh.engine.urgency import Urgency
from muxmesh.errors import SequenceFailed
from muxmesh.execution import PreemptionReason
from muxmesh.running_mean import RunningMean
from muxmesh.scheduling_policy import FCFS, SchedulingPolicy
from muxmesh.slo import catch_up_s, first_token_due_s, next_token_due_s, slack_s
from muxmesh.types import SchedulingState

TOKEN_TIME_RATE = 0.02
"""The seconds for a prompt token are a mean over about the last 50 steps with prompts."""


class _JobState(Enum):
    """What a job waits for. Only sequences that decode are batched or displaced.

    WAITING ⇄ BATCHED ⇄ DISPLACED; a slot is taken from a job that lacks a token block too: BATCHED → WAITING.
    Any → PAUSED → WAITING.
    """

    WAITING = auto()
    """For a step: a prompt, or a sequence that no batch has had since it was added, resumed or lacked a block."""
    BATCHED = auto()
    """The batch of the last step had it."""
    DISPLACED = auto()
    """For a slot of the batch, which others have; the last event about that was `Displaced`."""
    PAUSED = auto()
    """For `Scheduler.resume`."""


@dataclass(slots=True)
class _ScheduledJob:
    """A job of the scheduler. Invariant: its sequence has at least one token that is not computed."""

    job_id: int
    sequence: SequenceRecord
    max_output_tokens: int | None
    """The job ends when its sequence has this many output tokens; None: it ends with its sequence."""
    due_at_s: float
    """When its next token is due by its SLO (unix time); inf without one."""
    lost_after_s: float
    """Seconds after ``due_at_s`` at which its SLO is missed; 0 as long as its prompt is computed here."""
    state: _JobState = _JobState.WAITING
    pause_requested: bool = False
    """Whether it is to be paused after the step in flight."""

    @property
    def is_batched(self) -> bool:
        return self.state is _JobState.BATCHED

    @property
    def scheduling(self) -> SchedulingState:
        return self.sequence.scheduling

    @property
    def num_computed_tokens(self) -> int:
        return self.sequence.num_computed_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.sequence.num_uncomputed_tokens

    @property
    def num_preemptions(self) -> int:
        return self.sequence.num_preemptions

    @property
    def is_protected(self) -> bool:
        return self.sequence.is_protected

    @property
    def slack_s(self) -> float:
        return self.sequence.slack_s

    def update_slack(self, now_s: float) -> None:
        """To be called with each token, and before a batch is chosen."""
        self.sequence.slack_s = slack_s(self.due_at_s, self.lost_after_s, now_s)

    @property
    def max_steps(self) -> int:
        """The longest run of steps in which the sequence needs no block, no decision and nothing from the host.

        A run may go past a token that ends the sequence, but not past its longest possible output.
        """
        sequence = self.sequence
        if sequence.num_uncomputed_tokens > 1 or sequence.token_bitmask is not None:
            return 1
        num_outputs, stopping = sequence.num_output_tokens, sequence.request.stopping
        longest = min(stopping.max_new_tokens, self.max_output_tokens or stopping.max_new_tokens)
        steps = min(longest - num_outputs, sequence.num_free_slots + 1)
        if stopping.banned_at(num_outputs):
            steps = min(steps, stopping.min_new_tokens - 1 - num_outputs)
        return max(1, steps)

    @property
    def is_ready(self) -> bool:
        """Neither paused nor waiting for token blocks."""
        return self.state is not _JobState.PAUSED and self.sequence.num_free_slots >= 0


@dataclass(slots=True)
class Scheduler:
    """Owns the jobs of one engine: `next_step` → the runner computes it → `apply`.

    `choose_batch` chooses the sequences that decode, `divide_token_budget` the jobs of a step. At most one step is in
    flight. Events wait for `drain_events`.
    """

    max_num_seqs: int
    token_budget: int
    vocab_size: int
    """Token ids of the model are in [0, vocab_size)."""
    policy: SchedulingPolicy = FCFS
    _jobs: dict[int, _ScheduledJob] = field(default_factory=dict)
    _in_flight: Step | None = None
    _now_s: float = 0.0
    """Unix time of the latest step: when it was planned, or else when it ended."""
    _urgency: Urgency = field(default_factory=Urgency)
    _prompt_token_s: RunningMean = field(default_factory=lambda: RunningMean(TOKEN_TIME_RATE))
    """Seconds for each token of steps with prompts."""
    _events: list[tuple[int, Event]] = field(default_factory=list)

    def add(self, job: EngineJob, now_s: float = 0.0) -> None:
        """Adds a job. Raises ValueError if its id is already known, and InvalidRequest as `Engine.submit` does.

        Every token id of a sequence passes here or, if the runner sampled it, `_append_tokens`. By its SLO, the next
        token of a sequence that comes from prefill is due its TPOT target after ``now_s`` (unix time), the first one of
        any other its TTFT target after its arrival.
        """
        if job.job_id in self._jobs:
            raise ValueError(f"job {job.job_id} is known already")
        job.sequence.check_token_ids(self.vocab_size)
        limit = None if job.max_new_tokens is None else job.sequence.num_output_tokens + job.max_new_tokens
        slo = job.sequence.request.slo
        due_at_s, lost_after_s = first_token_due_s(slo, now_s), 0.0
        if job.sequence.num_output_tokens and job.sequence.num_uncomputed_tokens == 1:
            due_at_s, lost_after_s = next_token_due_s(slo, now_s), catch_up_s(slo)
        added = self._jobs[job.job_id] = _ScheduledJob(job.job_id, job.sequence, limit, due_at_s, lost_after_s)
        self._note(added)

    def cancel(self, job_id: int) -> bool:
        """Removes the job without an event. Returns True if the step in flight still accesses its KV."""
        self._jobs.pop(job_id, None)
        return self.is_in_flight(job_id)

    def preempt(self, job_id: int) -> None:
        """Pauses the job: after the step in flight if the job is part of it, else at once."""
        job = self._jobs.get(job_id)
        if job is None or job.state is _JobState.PAUSED:
            return
        if self.is_in_flight(job_id):
            job.pause_requested = True
        else:
            self._pause(job)

    def resume(self, job_id: int) -> None:
        """Lets a paused job run again."""
        if job := self._jobs.get(job_id):
            job.pause_requested = False
            if job.state is _JobState.PAUSED:
                job.state = _JobState.WAITING
            self._note(job)

    def is_in_flight(self, job_id: int) -> bool:
        """True if the job is part of the step in flight."""
        return self._in_flight is not None and any(chunk.job_id == job_id for chunk in self._in_flight.chunks)

    def has_work(self) -> bool:
        """True if `next_step` would return a step."""
        return any(job.is_ready for job in self._jobs.values())

    def demand(self, now_s: float) -> ComputeDemand:
        """What the arbiter is to know of the ready jobs at ``now_s`` (unix time), of which there is at least one.

        It is of the jobs that were ready at the latest step or were added or resumed since. One that was cancelled or
        paused since then counts until the next step.
        """
        if self._urgency.is_empty or self._urgency.is_outdated(now_s):
            self._now_s, self._urgency = now_s, Urgency()
            for job in self._jobs.values():
                if job.is_ready:
                    self._note(job)
        return self._urgency.demand(now_s)

    def next_step(self, now_s: float, max_steps: int = 1, limit: StepLimit | None = None) -> Step | None:
        """Plans the next step, which is in flight from then on; None if no job is ready. ``now_s``: unix time.

        ``limit``: how long the step may take, if it has prompts.

        It is a run of up to ``max_steps`` steps if no prompt waits and none of its jobs needs a decision between them.
        So every sequence has the same tokens for each ``max_steps``.
        """
        assert self._in_flight is None, "the step in flight is applied first"
        ready = [job for job in self._jobs.values() if job.is_ready]
        chosen = self._choose(ready, now_s)
        planned = divide_token_budget(chosen, self.policy, now_s, self.max_num_seqs, self.token_budget, limit)
        self._begin_urgency(ready, planned, now_s)
        num_steps = 1
        if max_steps > 1 and len(planned) == len(chosen):
            num_steps = min((job.max_steps for job in chosen), default=1)
        chunks = [_chunk(job, count) for job, count in planned]
        self._in_flight = Step(tuple(chunks), min(num_steps, max_steps)) if chunks else None
        return self._in_flight

    def apply(self, outcome: StepOutcome, run_s: float = 0.0) -> None:
        """Applies the outcome of the step in flight, whose steps took ``run_s`` seconds together."""
        step, self._in_flight = self._in_flight, None
        assert step is not None, "a step is in flight"
        step_s = run_s / outcome.num_steps
        self._now_s += run_s
        if run_s > 0 and (num_tokens := step.num_tokens) > len(step.chunks):
            self._prompt_token_s.add(step_s / num_tokens)
        for chunk in step.chunks:
            job = self._jobs.get(chunk.job_id)
            if job is None:  # cancelled while the step was in flight
                continue
            if (end := self._apply_chunk(job, chunk, outcome, step_s)) is not None:
                self._end(job, end)
            elif job.pause_requested:
                self._pause(job)
            else:
                self._note(job)

    def fail_all(self, failed: Failed) -> None:
        """Ends every job with ``failed``: the engine ends."""
        self._in_flight = None
        self._events += [(job_id, failed) for job_id in self._jobs]
        self._jobs.clear()

    def drain_events(self) -> list[tuple[int, Event]]:
        """Returns the events since the last call, oldest first, each with its job id."""
        events, self._events = self._events, []
        return events

    def _choose(self, ready: list[_ScheduledJob], now_s: float) -> list[_ScheduledJob]:
        """The jobs that may be in the next step: all prompts, and of the sequences that decode those of the batch.

        A job that cannot run, for want of a token block, loses its slot.
        """
        for job in self._jobs.values():
            if job.is_batched and not job.is_ready:
                job.state = _JobState.WAITING
        decoding = [job for job in ready if job.num_uncomputed_tokens == 1]
        if len(decoding) <= self.max_num_seqs:
            for job in decoding:
                self._batch(job)
            return ready
        for job in decoding:
            job.update_slack(now_s)
        reasons: dict[int, PreemptionReason] = {}

        def on_displaced(job: _ScheduledJob, reason: PreemptionReason) -> None:
            reasons[job.job_id] = reason

        batch = choose_batch(decoding, self.policy, now_s, self.max_num_seqs, on_displaced)
        batch_ids = {job.job_id for job in batch}
        for job in decoding:
            if job.job_id in batch_ids:
                self._batch(job)
            else:
                self._displace(job, reasons.get(job.job_id))
        return batch + [job for job in ready if job.num_uncomputed_tokens > 1]

    def _batch(self, job: _ScheduledJob) -> None:
        if job.state is _JobState.DISPLACED:
            self._events.append((job.job_id, Batched()))
        job.state = _JobState.BATCHED

    def _displace(self, job: _ScheduledJob, reason: PreemptionReason | None) -> None:
        job.sequence.num_preemptions += job.is_batched
        if job.state is not _JobState.DISPLACED:
            self._events.append((job.job_id, Displaced(reason if job.is_batched else None)))
        job.state = _JobState.DISPLACED

    def _begin_urgency(
        self, ready: Sequence[_ScheduledJob], planned: Sequence[tuple[_ScheduledJob, int]], now_s: float
    ) -> None:
        """Begins the demand after a step with the ready jobs that are not in it; `apply` adds those that are."""
        self._now_s, self._urgency = now_s, Urgency()
        if len(planned) < len(ready):
            planned_ids = {job.job_id for job, _ in planned}
            for job in ready:
                if job.job_id not in planned_ids:
                    self._note(job)

    def _note(self, job: _ScheduledJob) -> None:
        """Counts a ready job for `demand`. A prompt has to begin before its token is due, by the time that it needs."""
        start_by_s, lost_at_s = job.due_at_s, job.due_at_s + job.lost_after_s
        if not job.lost_after_s:
            start_by_s -= job.sequence.num_uncomputed_tokens * self._prompt_token_s.mean
        self._urgency.note(job.sequence.scheduling, start_by_s, lost_at_s, self._now_s)

    def _pause(self, job: _ScheduledJob) -> None:
        job.state, job.pause_requested = _JobState.PAUSED, False
        self._events.append((job.job_id, Preempted()))

    def _apply_chunk(self, job: _ScheduledJob, chunk: Chunk, outcome: StepOutcome, step_s: float) -> Event | None:
        """Records what was computed of a chunk. Returns the event that ends its job, or None."""
        failed = outcome.failed.get(job.job_id)
        if failed is not None and not outcome.sampled.get(job.job_id):
            return failed
        job.sequence.advance(len(chunk.token_ids), step_s)
        if chunk.scoring is not None:
            self._events.append((job.job_id, PromptLogprobs(outcome.prompt_logprobs[job.job_id])))
        if chunk.sample is None:
            return None
        return self._append_tokens(job, outcome.sampled[job.job_id], step_s) or failed

    def _append_tokens(self, job: _ScheduledJob, sampled: Sequence[SampledToken], step_s: float) -> Event | None:
        """Appends the tokens of a run up to the one that ends the job. Returns the event that ends it, or None.

        The rest is dropped. Its KV lies in slots of the sequence's own blocks that do not count as computed: no hash
        covers them, and the next owner of the blocks writes a slot before reading it.
        """
        end: Event | None = None
        sequence, first_index = job.sequence, job.sequence.num_output_tokens
        if job.max_output_tokens is not None:
            sampled = sampled[: job.max_output_tokens - first_index]
        token_ids = [token.token_id for token in sampled]
        if unknown := [token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size]:
            reason = f"the runner sampled token id {unknown[0]}; the model has {self.vocab_size} tokens"
            end = Failed(reason, SequenceFailed)
            token_ids = token_ids[: token_ids.index(unknown[0])]
        if (finish := sequence.extend(token_ids)) is not None:
            end = Finished(finish)
        elif end is None and sequence.num_output_tokens == job.max_output_tokens:
            end = JobDone()
        if kept := sampled[: sequence.num_output_tokens - first_index]:
            slo, is_first = sequence.request.slo, not job.lost_after_s
            job.due_at_s = next_token_due_s(slo, self._now_s if is_first else job.due_at_s, len(kept))
            job.lost_after_s = catch_up_s(slo)
            job.update_slack(self._now_s)
            num_fed_back = len(kept) - 1
            sequence.advance(num_fed_back, num_fed_back * step_s)
            logprobs = tuple(token.logprobs for token in kept if token.logprobs is not None)
            self._events.append((job.job_id, Tokens(first_index, tuple(token_ids[: len(kept)]), logprobs)))
        return end

    def _end(self, job: _ScheduledJob, event: Event) -> None:
        del self._jobs[job.job_id]
        self._events.append((job.job_id, event))


def _chunk(job: _ScheduledJob, count: int) -> Chunk:
    sequence = job.sequence
    start = sequence.num_computed_tokens
    sample = _sample_spec(sequence) if count == sequence.num_uncomputed_tokens else None
    tokens = sequence.tokens(start, start + count)
    return Chunk(job.job_id, start, tokens, sequence.block_ids, sample, _prompt_scoring(sequence, start, count))


def _sample_spec(sequence: SequenceRecord) -> SampleSpec:
    request, index = sequence.request, sequence.num_output_tokens
    has_penalties = request.sampling.has_penalties
    return SampleSpec(
        request.sampling,
        index,
        request.stopping.banned_at(index),
        request.sequence_index,
        request.prompt_token_ids if has_penalties else (),
        sequence.output_token_ids if has_penalties else (),
        sequence.token_bitmask,
    )


def _prompt_scoring(sequence: SequenceRecord, start: int, count: int) -> PromptScoring | None:
    """What a chunk has to score: the prompt tokens that follow its own, if their log-probabilities are requested."""
    requested, prompt = sequence.request.sampling.prompt_logprobs, sequence.request.prompt_token_ids
    following = prompt[start + 1 : start + count + 1]
    if requested is None or not following:
        return None
    return PromptScoring(following, requested)
