"""The engine seam: jobs in, events out. See docs/adr/0012 and 0013 for its reasons.

An engine computes sequences whose KV is in the unit's pool, in blocks that leases name. It knows no lease, no kvstore
and no wire format: the services own those. Sampling is keyed by (seed, output index), so a job that continues a
sequence samples what the uninterrupted job would have sampled.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from muxmesh.engine.sequence import SequenceRecord
from muxmesh.types import Finish, TokenLogprobs


@dataclass(frozen=True, slots=True)
class EngineJob:
    """One sequence's work in one engine. ``max_new_tokens``: the job ends after so many, for prefill; None: with the
    sequence.
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
    """Log-probabilities of the next prompt tokens, in order; the first of all are of the second prompt token."""

    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class JobDone:
    """Last event of a job that reached its ``max_new_tokens``: the sequence goes on elsewhere."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event of a job whose sequence finished."""

    finish: Finish


@dataclass(frozen=True, slots=True)
class Preempted:
    """The job does not run until it is resumed. Its KV stays where it is."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Last event of a job that was lost. The engine lives on."""

    reason: str


Event = Tokens | PromptLogprobs | JobDone | Finished | Preempted | Failed


class Engine(Protocol):
    """Runs the jobs of one model in one process."""

    async def start(self) -> None:
        """Loads and warms up. Raises ModelUnsupported if the model cannot be loaded."""

    async def stop(self) -> None:
        """Ends every job with Failed and frees what `start` allocated."""

    def submit(self, job: EngineJob) -> AsyncIterator[Event]:
        """Adds the job at once; yields its events until the last one (JobDone, Finished or Failed).

        Each step of the job is in its sequence's record before its events are yielded.
        """

    async def cancel(self, job_id: int) -> None:
        """Ends the job without further events; returns when its KV is no longer read or written.

        Does nothing for a job that has ended or is not known.
        """

    def preempt(self, job_id: int) -> None:
        """Requests that the job stops running. Preempted follows, unless the job ends first."""

    def resume(self, job_id: int) -> None:
        """Lets a pre-empted job run again, in the blocks that its sequence has now."""

    def sequence_changed(self, job_id: int) -> None:
        """The sequence has more blocks, or another scheduling state. A job whose blocks are full waits for more."""

    async def wait_dead(self) -> str:
        """Returns the reason when the engine cannot go on; its jobs have ended with Failed."""


class Grant(Protocol):
    """The right to compute on the device now. Taken around each step; see kvstore.grant_page."""

    async def acquire(self) -> None:
        """Waits until this worker may compute."""

    def release(self) -> None:
        """After a step: keeps the right unless another worker waits for it."""

    def drop(self) -> None:
        """Nothing to compute: gives the right back."""


class FreeGrant:
    """A device used by one worker: always granted."""

    async def acquire(self) -> None:
        """See `Grant`."""

    def release(self) -> None:
        """See `Grant`."""

    def drop(self) -> None:
        """See `Grant`."""
