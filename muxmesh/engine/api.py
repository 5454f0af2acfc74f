"""The engine seam: jobs in, events out. See docs/adr/0012 and 0013 for its reasons.

An engine computes sequences whose KV is in the unit's pool, in the token blocks of their records. It knows no lease, no
kvstore and no wire format: the services own those. Sampling is keyed by (seed, output index), so a job that continues a
sequence samples what the uninterrupted job would have sampled.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from muxmesh.engine.sequence import SequenceRecord
from muxmesh.engine.step_limit import StepLimit
from muxmesh.errors import EngineFailed, MeshError
from muxmesh.execution import PreemptionReason
from muxmesh.types import Finish, TokenLogprobs


@dataclass(frozen=True, slots=True)
class EngineJob:
    """One sequence's work in one engine.

    The job ends with its sequence, or after ``max_new_tokens`` new output tokens. Prefill sets it, decode does not.
    """

    job_id: int
    sequence: SequenceRecord
    max_new_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """New output tokens; ``start_index`` is the output index of the first.

    ``logprobs`` has one entry for each token if the request asks for them, else none.
    """

    start_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of further prompt tokens, in order. The job's first event begins at the second prompt token."""

    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class JobDone:
    """Last event of a job that reached its ``max_new_tokens``. Its sequence continues in another engine."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event of a job whose sequence is finished."""

    finish: Finish


@dataclass(frozen=True, slots=True)
class Preempted:
    """The job does not run until it is resumed. The engine leaves its KV in its token blocks."""


@dataclass(frozen=True, slots=True)
class Displaced:
    """The job is not in the batch, because other jobs precede it. It keeps its KV, and runs again by itself.

    ``reason``: why it lost its slot; None: it had none.
    """

    reason: PreemptionReason | None = None


@dataclass(frozen=True, slots=True)
class Batched:
    """The job is in the batch again."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Last event of a job that is lost.

    ``kind``: EngineFailed if a step or the engine loop raised, SequenceFailed if no engine can compute the sequence,
    WorkerLost if the engine was stopped.
    """

    reason: str
    kind: type[MeshError] = EngineFailed

    @property
    def error(self) -> MeshError:
        """The error that the request's attempt ends with."""
        return self.kind(self.reason)


Event = Tokens | PromptLogprobs | JobDone | Finished | Preempted | Displaced | Batched | Failed


class Engine(Protocol):
    """Runs the jobs of one model in one process. All methods are called on one event loop."""

    async def start(self, asleep: bool = False) -> None:
        """Loads the model and warms up. Raises ModelUnsupported if the model cannot be loaded.

        ``asleep``: loads nothing; the engine is as after ``sleep(drop_weights=True)``.
        """

    async def sleep(self, drop_weights: bool) -> None:
        """Ends its threads, and frees what only a computing engine needs. Returns when nothing reads or writes KV.

        ``drop_weights``: also unmaps the weights, or frees its copy of them; may follow a `sleep` without. Raises
        ValueError if a job has not ended. Until `wake`, `submit` raises WorkerLost.
        """

    async def wake(self) -> None:
        """Undoes `sleep`: loads what is not loaded, and warms up. Does nothing in an engine that is awake.

        Raises what `start` raises.
        """

    async def stop(self) -> None:
        """Ends every job with Failed and frees what `start` allocated."""

    def submit(self, job: EngineJob) -> AsyncIterator[Event]:
        """Adds the job before it returns. Yields the job's events; the last is JobDone, Finished or Failed.

        Each step of the job is in its sequence's record before the step's events are yielded. Raises InvalidRequest if
        the sequence or its request has a token id that the model does not have: no kernel ever reads one.
        """

    async def cancel(self, job_id: int) -> None:
        """Ends the job without further events. Returns when the engine neither reads nor writes its KV.

        Does nothing for a job that has ended or is not known.
        """

    def preempt(self, job_id: int) -> None:
        """Requests that the job is paused. Preempted follows, unless the job ends or is resumed first."""

    def resume(self, job_id: int) -> None:
        """Lets a paused job run again, in the token blocks that its sequence has by then."""

    def sequence_changed(self, job_id: int) -> None:
        """To be called after the record's blocks changed.

        A job whose last known token has no slot in its blocks does not run until this call.
        """

    async def wait_dead(self) -> str:
        """Waits until the engine cannot continue, and returns the reason. By then all jobs have ended with Failed."""


_SLACK_STEP_S = 0.001
"""Smaller differences of slack do not matter."""


@dataclass(frozen=True, slots=True)
class ComputeDemand:
    """What the sequences that an engine can compute need, for the choice between workers.

    Those that the batch has no slot for count too: the sooner its worker computes, the sooner they have one.
    ``priority``: their best class, lower is sooner. ``arrived_at_s``: unix time at which the oldest request among them
    arrived; 0: not known. ``slack_s``: seconds until the first of those that can still meet their latency target has to
    compute, negative if it is late; infinite without a target. ``lost_s``: seconds until that one has missed its
    target, which is later where it may catch up; negative if all have missed theirs.
    """

    priority: int = 0
    arrived_at_s: float = 0.0
    slack_s: float = math.inf
    lost_s: float = math.inf

    def is_more_urgent_than(self, earlier: ComputeDemand, passed_s: float) -> bool:
        """Whether a sequence more urgent than those of ``earlier`` has come in the ``passed_s`` seconds since then."""
        was_met, left_s = earlier.lost_s >= passed_s, earlier.slack_s - passed_s
        is_due_sooner = self.lost_s >= 0 and (not was_met or self.slack_s < left_s - _SLACK_STEP_S)
        return self.priority < earlier.priority or self.arrived_at_s < earlier.arrived_at_s or is_due_sooner


class Grant(Protocol):
    """The right to compute on the device, acquired for each run of steps. See `kvstore.grant_page`."""

    @property
    def is_recalled(self) -> bool:
        """True while another worker waits for the right. Cheap, and may be read from any thread."""

    @property
    def step_limit(self) -> StepLimit | None:
        """How long the next step may take if it has prompts, for the sake of workers that wait; None: as long as it
        takes. To be read when the step is planned.
        """

    async def acquire(self, demand: ComputeDemand) -> None:
        """Waits until this worker may compute. ``demand``: what for."""

    def revise(self, demand: ComputeDemand) -> None:
        """The demand of the `acquire` in progress is more urgent now: a sequence was added."""

    def release(self, num_steps: int) -> None:
        """Called after ``num_steps`` steps, 0 if none was left to compute. `acquire` or `drop` follows at once.

        The worker keeps the right unless another worker waits for it. Else it is returned with the call that follows.
        """

    def drop(self) -> None:
        """Returns the right, if the worker has it: there is nothing to compute."""


class FreeGrant:
    """`Grant` of a device that only one worker uses: always granted."""

    is_recalled = False
    step_limit: StepLimit | None = None

    async def acquire(self, demand: ComputeDemand) -> None: ...

    def revise(self, demand: ComputeDemand) -> None: ...

    def release(self, num_steps: int) -> None: ...

    def drop(self) -> None: ...
