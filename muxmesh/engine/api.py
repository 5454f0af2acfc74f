"""The engine seam: jobs in, events out. See docs/adr/0001 for how vLLM fits it.

An engine knows jobs, tokens and block ids. It knows no lease, no kvstore and no wire format: the services own those.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol

from muxmesh.types import EngineRequest, Finish, Standing, TokenLogprobs


class Until(enum.Enum):
    """Where a job ends."""

    FIRST_TOKEN = "first_token"  # noqa: S105 - not a secret
    FINISH = "finish"


@dataclass(frozen=True, slots=True)
class EngineJob:
    """One request's work in one engine.

    ``num_computed_tokens`` tokens already have their KV (in ``block_ids``, or in what ``handoff`` names).
    ``sampled_token_ids`` follow the request's ``resume_token_ids``: sampled elsewhere, not computed yet.
    ``block_ids`` hold every token that is known and perhaps more; they are empty if the engine owns its KV.
    """

    job_id: int
    request: EngineRequest
    until: Until
    block_ids: tuple[int, ...] = ()
    num_computed_tokens: int = 0
    sampled_token_ids: tuple[int, ...] = ()
    handoff: bytes = b""


@dataclass(frozen=True, slots=True)
class Tokens:
    """New output tokens; ``start_index`` is the place of the first in the answer.

    ``logprobs`` has one entry for each token if the request wants them, else none.
    """

    start_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Log-probabilities of the next prompt tokens, in order; the first of all belong to the second prompt token."""

    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """Last event of a FIRST_TOKEN job whose answer goes on: what the decode engine starts from."""

    num_computed_tokens: int
    handoff: bytes = b""


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event of a job whose answer ended."""

    finish: Finish


@dataclass(frozen=True, slots=True)
class Preempted:
    """The job does not run until it is resumed. ``kv_kept``: it need not be computed again."""

    kv_kept: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """Last event of a job that was lost. The engine lives on."""

    reason: str


Event = Tokens | PromptScored | PrefillDone | Finished | Preempted | Failed


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine can promise."""

    kv_residence: Literal["pool", "engine"]
    """`pool`: jobs bring block ids. `engine`: it owns its KV, and a lease is only a slot."""
    resumes_exactly: bool
    """A resumed job draws the numbers that the undisturbed one would have drawn."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start."""

    num_steps: int
    num_computed_tokens: int
    num_jobs: int


class Engine(Protocol):
    """What serves the jobs of one model in one process."""

    @property
    def info(self) -> EngineInfo:
        """What this engine can promise."""

    async def start(self) -> None:
        """Loads and warms up. Raises ModelUnsupported if the model cannot be loaded."""

    async def stop(self) -> None:
        """Ends every job with Failed and frees what `start` took."""

    def submit(self, job: EngineJob) -> AsyncIterator[Event]:
        """Takes the job at once; yields its events until the last one (PrefillDone, Finished or Failed)."""

    async def cancel(self, job_id: int) -> None:
        """Ends the job without further events; returns when its KV is no longer read or written.

        A job that has ended, or is not known, is fine.
        """

    def preempt(self, job_id: int) -> None:
        """Wishes the job off the device; Preempted says when, unless it ends first."""

    def resume(self, job_id: int, block_ids: tuple[int, ...] | None = None) -> None:
        """Lets a pre-empted job go on; with ``block_ids``, in these blocks, which hold its KV now."""

    def extend(self, job_id: int, block_ids: tuple[int, ...]) -> None:
        """More token blocks, after those that the job has. A job whose blocks are full waits for them."""

    def abandon(self, job_id: int, reason: str) -> None:
        """Ends the job with Failed(reason); `cancel` tells when its KV is no longer touched."""

    def reprioritise(self, job_id: int, standing: Standing) -> None:
        """Gives the job another place in the order."""

    async def wait_dead(self) -> str:
        """Returns when the engine cannot go on, and says why; its jobs have ended with Failed."""

    def stats(self) -> EngineStats:
        """Counters since the start."""


class Grant(Protocol):
    """The right to compute on the device now. Taken around each step; see kvstore.grant."""

    async def acquire(self) -> None:
        """Waits until this worker may compute."""

    def release(self) -> None:
        """After a step: keeps the right if nobody else wants it."""

    def drop(self) -> None:
        """Nothing to compute: gives the right back."""


class FreeGrant:
    """A device of one's own: always granted."""

    async def acquire(self) -> None:
        """See `Grant`."""

    def release(self) -> None:
        """See `Grant`."""

    def drop(self) -> None:
        """See `Grant`."""
