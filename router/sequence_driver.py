"""Computes one output sequence over several attempts: a lost worker costs time, but no token.

Does not call workers (`router.attempt`) and does not build text (`router.sequence_output`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, replace

from muxmesh.clock import Clock
from muxmesh.engine.api import Tokens
from muxmesh.errors import (
    EngineFailed,
    InternalError,
    LeaseLost,
    MeshError,
    RequestAborted,
    RequestPreempted,
    Unavailable,
)
from muxmesh.execution import NO_EXECUTION, Execution
from muxmesh.types import NO_WAITS, EngineRequest, Waits
from router.admission_client import Credit
from router.attempt import AttemptEvent, Prefilled, Reported
from router.credit_wait import CreditedAttempt
from router.generation import SequenceDelta
from router.sequence_output import SequenceOutput
from router.units import ChosenUnit

_log = logging.getLogger(__name__)

_ATTEMPT_ERRORS = (Unavailable, LeaseLost, RequestAborted, EngineFailed, InternalError)
"""Errors that end an attempt but not the request: a worker, its lease or its engine was lost. A retry may succeed."""
_DETERMINISTIC = (EngineFailed, InternalError)
"""Of these, an error that a second attempt meets at the same token with the same text is not retried again."""
_FIRST_WAIT_S = 0.05
_MAX_WAIT_S = 2.0


Attempt = Callable[[EngineRequest, Credit], AsyncGenerator[AttemptEvent, None]]
"""One attempt, see `router.attempt.run_attempt`."""

Credited = Callable[[EngineRequest, ChosenUnit | None], AbstractAsyncContextManager[CreditedAttempt]]
"""Waits for a credit, see `router.credit_wait.CreditWait.credited`."""

_NO_REPORT = Reported(NO_EXECUTION)


@dataclass(slots=True)
class Decoding:
    """One attempt after its prefill, which ended at ``begun_at_s`` (monotonic), and its worker's latest report."""

    begun_at_s: float
    reported: Reported = _NO_REPORT

    def execution(self, now_s: float) -> Execution:
        """What became of the sequence until ``now_s``.

        Without a final report, of a worker that is lost or an output that a stop string ended, the time since the
        latest one counts as in the batch: it is of a return there.
        """
        execution = self.reported.execution
        if self.reported.is_final:
            return execution
        batched_s = now_s - self.begun_at_s - execution.paused_s - execution.swapped_s
        return replace(execution, batched_s=max(execution.batched_s, batched_s))


@dataclass(slots=True)
class Progress:
    """The state of one running sequence.

    ``credit`` and ``chosen``, the unit, are those of its first attempt, ``prefilled`` that of its last.
    """

    credited_at_s: float | None = None
    credit: Credit | None = None
    chosen: ChosenUnit | None = None
    prefilled: Prefilled | None = None
    num_restarts: int = 0
    waited_s: float = 0.0
    """Seconds that the sequence has waited for credits and for prefill until its first token."""
    waits: Waits = NO_WAITS
    """What it has waited for until its first token, over all attempts."""
    ended: Execution = NO_EXECUTION
    """What became of it in the attempts that have ended."""
    decoding: Decoding | None = None
    """The present attempt, once it has computed the prompt."""
    _lost_at_s: float | None = None
    """When the sequence lost its KV, until it is computed again."""

    def execution(self, now_s: float) -> Execution:
        """What became of the sequence over all attempts, until ``now_s`` (monotonic)."""
        return self.ended if self.decoding is None else self.ended.plus(self.decoding.execution(now_s))

    def note(self, event: Prefilled | Reported, has_output: bool, now_s: float) -> None:
        """What an attempt yields beside tokens. ``has_output``: the sequence has tokens of an attempt before."""
        if isinstance(event, Reported):
            assert self.decoding is not None, "decode follows prefill"
            self.decoding.reported = event
            return
        self.prefilled, self.decoding = event, Decoding(now_s)
        if self._lost_at_s is not None:
            self.ended = self.ended.plus(Execution(recomputed_s=now_s - self._lost_at_s))
            self._lost_at_s = None
        if not has_output:
            self.waited_s += event.waited_s
            self.waits = self.waits.plus(Waits(device_s=event.device_wait_s))

    def attempt_ended(self, has_output: bool, now_s: float) -> None:
        """To be called at the end of each attempt. ``has_output``: the sequence has tokens."""
        self.ended, self.decoding = self.execution(now_s), None
        if has_output and self._lost_at_s is None:
            self._lost_at_s = now_s

    def queued_s(self, arrived_at_s: float) -> float:
        """Seconds from the arrival to the first credit; 0 without a credit."""
        return (self.credited_at_s or arrived_at_s) - arrived_at_s


@dataclass(slots=True)
class _Failures:
    """The failed attempts of one sequence. ``num_fruitless`` counts those in a row that got at most one new token."""

    max_restarts: int
    num_fruitless: int = 0
    _last: tuple[type[MeshError], str, int] | None = None

    def add(self, error: MeshError, num_before: int, num_tokens: int) -> bool:
        """Adds an attempt that had ``num_before`` tokens and failed after ``num_tokens``. True if it was the last."""
        # Each attempt samples a token in prefill: only a second one is progress. Pre-emption is no failure.
        is_fruitless = num_tokens <= num_before + 1 and not isinstance(error, RequestPreempted)
        self.num_fruitless = self.num_fruitless + 1 if is_fruitless else 0
        failure = (type(error), str(error), num_tokens)
        is_repeated = failure == self._last and isinstance(error, _DETERMINISTIC)
        self._last = failure
        return self.num_fruitless > self.max_restarts or is_repeated


class SequenceDriver:
    """Repeats attempts until a sequence finishes."""

    def __init__(
        self,
        credited: Credited,
        attempt: Attempt,
        clock: Clock,
        max_restarts: int,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """``max_restarts``: how many attempts in a row may fail without getting past their first token."""
        self._credited = credited
        self._run_attempt = attempt
        self._clock = clock
        self._max_restarts = max_restarts
        self._sleep = sleep

    async def run(
        self, request: EngineRequest, output: SequenceOutput, progress: Progress, first: ChosenUnit | None = None
    ) -> AsyncGenerator[SequenceDelta, None]:
        """Yields every token once, in order; the last delta has the finish. Closing the generator aborts the sequence.

        ``first``: the unit of the first attempt, if it is chosen already.

        Raises InvalidRequest if the unit can never hold the sequence, SequenceFailed if no engine can compute it, and
        the last attempt's error after ``max_restarts`` or if it is the same as that of the attempt before.
        """
        failures = _Failures(self._max_restarts)
        while output.finish is None:
            num_before = len(output.token_ids)
            attempt = _resumed(request, output, progress.ended.num_displaced)
            try:
                async with (
                    self._credit(attempt, progress, first) as credited,
                    aclosing(self._attempt(attempt, credited.credit)) as events,
                ):
                    async for event in events:
                        if isinstance(event, Prefilled):
                            credited.prefilled(event.num_cached_tokens)
                        if isinstance(event, Prefilled | Reported):
                            progress.note(event, bool(output.token_ids), self._clock.monotonic_s())
                        elif isinstance(event, Tokens):
                            yield output.append(event.token_ids, event.logprobs)
                        else:
                            yield output.complete(event.finish)
                        if output.finish is not None:
                            return
            except _ATTEMPT_ERRORS as error:
                if output.token_finish is None:
                    if failures.add(error, num_before, len(output.token_ids)):
                        raise _final(error) from error
                    progress.num_restarts += 1
                    _log.warning("%s: retried after %d tokens: %s", request.request_id, len(output.token_ids), error)
            finally:
                first = None
                progress.attempt_ended(bool(output.token_ids), self._clock.monotonic_s())
            if (finish := output.token_finish) is not None:  # only the report of the finish was lost
                yield output.complete(finish)
                return
            await self._sleep(min(_MAX_WAIT_S, _FIRST_WAIT_S * 2**failures.num_fruitless))

    def _attempt(self, request: EngineRequest, credit: Credit) -> AsyncGenerator[AttemptEvent, None]:
        """One attempt. Workers order the request by the same state as the unit, whose clock they have."""
        request = request.after_wait(self._clock.unix_s() - request.scheduling.arrived_at_s)
        return self._run_attempt(replace(request, scheduling=credit.scheduling), credit)

    @asynccontextmanager
    async def _credit(
        self, request: EngineRequest, progress: Progress, first: ChosenUnit | None
    ) -> AsyncIterator[CreditedAttempt]:
        """Waits for a credit and notes the wait. The credit is returned when the block ends."""
        requested_at_s = self._clock.monotonic_s()
        async with self._credited(request, first) as credited:
            credited_at_s = self._clock.monotonic_s()
            if progress.credited_at_s is None:
                progress.credited_at_s = credited_at_s
                progress.credit, progress.chosen = credited.credit, credited.chosen
            if not request.resume_token_ids:
                progress.waited_s += credited_at_s - requested_at_s
                progress.waits = progress.waits.plus(credited.credit.waits)
            yield credited


def _resumed(request: EngineRequest, output: SequenceOutput, num_preemptions: int) -> EngineRequest:
    """The request without what the client already has: output tokens, and log-probabilities of the prompt.

    ``num_preemptions``: how often it was displaced from a batch.
    """
    if not output.token_ids:
        return request
    sampling = replace(request.sampling, prompt_logprobs=None)
    num_tokens = len(output.token_ids)
    scheduling = request.scheduling.after_output(num_tokens, request.prediction, prefill_again=True)
    scheduling = replace(scheduling, num_preemptions=num_preemptions)
    return replace(request, resume_token_ids=tuple(output.token_ids), sampling=sampling, scheduling=scheduling)


def _final(error: MeshError) -> MeshError:
    """The error that the client receives after the last attempt."""
    return error if isinstance(error, Unavailable) else InternalError(f"the request failed repeatedly: {error}")
