"""Which jobs run in the next step. Pure: no clock, no I/O, no tensor.

There is no prefill phase and no decode phase here, only jobs with tokens that are not computed yet
(`num_computed_tokens`, as in vLLM's scheduler): a prompt is a long run of them, a decode step is one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from muxmesh.engine.api import (
    EngineJob,
    Event,
    Failed,
    Finished,
    Preempted,
    PrefillDone,
    PromptScored,
    Tokens,
    Until,
)
from muxmesh.engine.step import Chunk, Draw, Drawn, Score, Step, StepOutcome
from muxmesh.order import FCFS, Order
from muxmesh.types import Standing, blocks_for

_TOKENS_PER_COST = 1024
"""Attention over so many earlier tokens costs about as much as everything else that is computed for a token."""


class Uncomputed(Protocol):
    """What a step is planned by, of one job."""

    @property
    def standing(self) -> Standing:
        """Its request's."""

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose KV is there."""

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens to compute, at least 1."""


_Job = TypeVar("_Job", bound=Uncomputed)


def share_out(
    jobs: Iterable[_Job], order: Order, now_s: float, max_num_seqs: int, token_budget: int
) -> list[tuple[_Job, int]]:
    """Who is in the next step, with how many tokens. See `Scheduler`; ``now_s`` is unix time."""
    ready = sorted(jobs, key=lambda job: (job.num_uncomputed_tokens > 1, order.key(job.standing, now_s)))
    shares: list[tuple[_Job, int]] = []
    for job in ready[:max_num_seqs]:
        uncomputed = job.num_uncomputed_tokens
        cost = 1 + job.num_computed_tokens // _TOKENS_PER_COST if uncomputed > 1 else 1
        count = min(uncomputed, max(token_budget // cost, 0 if shares else 1))
        if count == 0:
            break
        shares.append((job, count))
        token_budget -= count * cost
    return shares


@dataclass(slots=True)
class _Running:
    """A job and how far it is. Invariant: num_computed_tokens < len(token_ids) while it is known here."""

    job: EngineJob
    standing: Standing
    token_ids: list[int]
    num_computed_tokens: int
    block_ids: tuple[int, ...]
    paused: bool = False
    pause_wished: bool = False

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.job.request.prompt_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens


@dataclass(slots=True)
class Scheduler:
    """Owns the jobs of one engine. ``next_step()`` → run → ``apply()``; events wait in ``drain()``.

    Jobs that need one token go first, all of them up to ``max_num_seqs``; what is left of ``token_budget`` is
    filled with chunks of longer runs. Both as ``order`` has it. A token of a chunk costs more the further it
    looks back, so that a step takes about as long at the end of a long prompt as at its start. At most one step is
    in flight.
    """

    max_num_seqs: int
    token_budget: int
    block_size: int
    order: Order = FCFS
    num_steps: int = 0
    num_computed_tokens: int = 0
    _jobs: dict[int, _Running] = field(default_factory=dict)
    _in_flight: Step | None = None
    _events: list[tuple[int, Event]] = field(default_factory=list)

    def add(self, job: EngineJob) -> None:
        """Takes a job. Raises ValueError if its id is known already or its blocks do not hold its tokens."""
        if job.job_id in self._jobs:
            raise ValueError(f"job {job.job_id} is known already")
        request = job.request
        tokens = [*request.prompt_token_ids, *request.resume_token_ids, *job.sampled_token_ids]
        if not 0 <= job.num_computed_tokens < len(tokens):
            raise ValueError(f"job {job.job_id}: {job.num_computed_tokens} of {len(tokens)} tokens are computed")
        needed = blocks_for(len(tokens), self.block_size)
        if job.block_ids and len(job.block_ids) < needed:
            raise ValueError(f"job {job.job_id}: {len(job.block_ids)} token blocks, needs {needed}")
        self._jobs[job.job_id] = _Running(job, request.standing, tokens, job.num_computed_tokens, job.block_ids)

    def cancel(self, job_id: int) -> bool:
        """Forgets the job; True if the step in flight still touches its KV."""
        self._jobs.pop(job_id, None)
        return self._is_in_flight(job_id)

    def preempt(self, job_id: int) -> None:
        """Pauses the job, after the step in flight if it is in it. Keeps its KV."""
        running = self._jobs.get(job_id)
        if running is None or running.paused:
            return
        if self._is_in_flight(job_id):
            running.pause_wished = True
        else:
            self._pause(running)

    def resume(self, job_id: int, block_ids: tuple[int, ...] | None = None) -> None:
        """Lets a paused job go on; with ``block_ids``, in these blocks instead of those that it had."""
        if running := self._jobs.get(job_id):
            running.paused = running.pause_wished = False
            if block_ids is not None:
                assert not self._is_in_flight(job_id), "a job in flight does not move"
                running.block_ids = block_ids

    def extend(self, job_id: int, block_ids: tuple[int, ...]) -> None:
        """More token blocks for the job, after those that it has."""
        if running := self._jobs.get(job_id):
            running.block_ids += block_ids

    def abandon(self, job_id: int, reason: str) -> None:
        """Ends the job with Failed, though the step in flight may still touch its KV."""
        if job_id in self._jobs:
            self._end(self._jobs[job_id].job, Failed(reason))

    def reprioritise(self, job_id: int, standing: Standing) -> None:
        """Gives the job another place in the order, from the next step on."""
        if running := self._jobs.get(job_id):
            running.standing = standing

    def has_work(self) -> bool:
        """True if `next_step` would give a step."""
        return any(self._is_ready(running) for running in self._jobs.values())

    @property
    def num_jobs(self) -> int:
        """Jobs known, paused ones too."""
        return len(self._jobs)

    def next_step(self, now_s: float = 0.0) -> Step | None:
        """The next step, or None if there is nothing to compute. ``now_s``: unix time."""
        assert self._in_flight is None, "the step in flight is applied first"
        ready = filter(self._is_ready, self._jobs.values())
        shares = share_out(ready, self.order, now_s, self.max_num_seqs, self.token_budget)
        chunks = [self._chunk(running, count) for running, count in shares]
        self._in_flight = Step(tuple(chunks)) if chunks else None
        return self._in_flight

    def apply(self, outcome: StepOutcome) -> None:
        """Takes in what the step in flight gave."""
        step, self._in_flight = self._in_flight, None
        assert step is not None, "a step is in flight"
        self.num_steps += 1
        self.num_computed_tokens += step.num_tokens
        for chunk in step.chunks:
            running = self._jobs.get(chunk.job_id)
            if running is None:  # cancelled meanwhile
                continue
            running.num_computed_tokens += len(chunk.token_ids)
            if chunk.score is not None:
                self._events.append((chunk.job_id, PromptScored(outcome.scored[chunk.job_id])))
            if chunk.draw is not None:
                self._take_token(running, outcome.drawn[chunk.job_id])
            if running.pause_wished and chunk.job_id in self._jobs:
                self._pause(running)

    def fail(self, reason: str) -> None:
        """The step in flight raised: its jobs are lost."""
        step, self._in_flight = self._in_flight, None
        assert step is not None, "a step is in flight"
        for chunk in step.chunks:
            if self._jobs.pop(chunk.job_id, None):
                self._events.append((chunk.job_id, Failed(reason)))

    def fail_all(self, reason: str) -> None:
        """The engine ends: every job is lost."""
        self._in_flight = None
        self._events += [(job_id, Failed(reason)) for job_id in self._jobs]
        self._jobs.clear()

    def drain(self) -> list[tuple[int, Event]]:
        """Events since the last call, oldest first, with their job ids."""
        events, self._events = self._events, []
        return events

    def _is_ready(self, running: _Running) -> bool:
        """Neither paused nor waiting for token blocks."""
        has_room = not running.block_ids or len(running.token_ids) <= len(running.block_ids) * self.block_size
        return has_room and not running.paused

    def _is_in_flight(self, job_id: int) -> bool:
        return self._in_flight is not None and any(chunk.job_id == job_id for chunk in self._in_flight.chunks)

    def _pause(self, running: _Running) -> None:
        running.paused, running.pause_wished = True, False
        self._events.append((running.job.job_id, Preempted(kv_kept=True)))

    @staticmethod
    def _chunk(running: _Running, count: int) -> Chunk:
        start, job = running.num_computed_tokens, running.job
        draw = _draw(running) if count == running.num_uncomputed_tokens else None
        tokens = tuple(running.token_ids[start : start + count])
        return Chunk(job.job_id, start, tokens, running.block_ids, draw, _score(job, start, count))

    def _take_token(self, running: _Running, drawn: Drawn) -> None:
        job = running.job
        logprobs = () if drawn.logprobs is None else (drawn.logprobs,)
        self._events.append((job.job_id, Tokens(running.num_output_tokens, (drawn.token_id,), logprobs)))
        running.token_ids.append(drawn.token_id)
        finish = job.request.stopping.finish_after(drawn.token_id, running.num_output_tokens)
        if finish is not None:
            self._end(job, Finished(finish))
        elif job.until is Until.FIRST_TOKEN:
            self._end(job, PrefillDone(running.num_computed_tokens))

    def _end(self, job: EngineJob, event: Event) -> None:
        del self._jobs[job.job_id]
        self._events.append((job.job_id, event))


def _draw(running: _Running) -> Draw:
    request, index = running.job.request, running.num_output_tokens
    banned = request.stopping.banned_at(index)
    if not request.sampling.looks_back:
        return Draw(request.sampling, index, banned, request.sequence)
    prompt = request.prompt_token_ids
    return Draw(request.sampling, index, banned, request.sequence, prompt, tuple(running.token_ids[len(prompt) :]))


def _score(job: EngineJob, start: int, count: int) -> Score | None:
    """What a chunk of a prompt whose log-probabilities are wanted has to score."""
    wanted, prompt = job.request.sampling.prompt_logprobs, job.request.prompt_token_ids
    following = prompt[start + 1 : start + count + 1]
    if wanted is None or job.until is not Until.FIRST_TOKEN or not following:
        return None
    return Score(following, wanted)
