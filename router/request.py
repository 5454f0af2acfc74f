"""Serves one request across as many attempts as it takes: a lost worker costs time, never a token."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace

from muxmesh.clock import Clock
from muxmesh.config.schema import ModelConfig
from muxmesh.engine.api import Finished, Tokens
from muxmesh.errors import EngineFailed, GaveWay, InternalError, LeaseLost, MeshError, RequestAborted, Unavailable
from muxmesh.prefix import kv_demand
from muxmesh.types import EngineRequest
from router.attempt import AnswerEvent, Prefilled
from router.credits import Credit, UnitCredits

_log = logging.getLogger(__name__)

# What ends an attempt but not the request: the worker, its unit or its engine was lost, and another try may do.
_ATTEMPT_ERRORS = (Unavailable, LeaseLost, RequestAborted, EngineFailed, InternalError)
_FIRST_WAIT_S = 0.05
_LONGEST_WAIT_S = 2.0


Attempt = Callable[[EngineRequest, Credit], AsyncGenerator[AnswerEvent, None]]
"""One attempt, see `router.attempt.run_attempt`."""


@dataclass(slots=True)
class Progress:
    """What the driver tells about one request while it runs."""

    credited_at_s: float | None = None
    credit: Credit | None = None
    """The first one."""
    num_restarts: int = 0
    waited_s: float = 0.0
    """For credits and for prefill, until the first token: what the router did not take itself."""

    def queued_s(self, arrived_at_s: float) -> float:
        """Seconds from the arrival to the first credit; 0 if there was none."""
        return (self.credited_at_s or arrived_at_s) - arrived_at_s


class RequestDriver:
    """Drives the requests of one unit."""

    def __init__(
        self,
        credits: UnitCredits,
        attempt: Attempt,
        models: Mapping[str, ModelConfig],
        clock: Clock,
        max_restarts: int,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """``max_restarts``: attempts in a row that may fail without getting past their first token."""
        self._credits = credits
        self._run_attempt = attempt
        self._models = models
        self._sleep = sleep
        self._clock = clock
        self._max_restarts = max_restarts

    async def run(self, request: EngineRequest, progress: Progress) -> AsyncGenerator[AnswerEvent, None]:
        """Every token of the answer once, in order, then Finished. Closing it aborts the request everywhere.

        Raises InvalidRequest if the unit can never hold it, and the last attempt's error after ``max_restarts``.
        """
        sent: list[int] = []
        fruitless = 0
        while True:
            sent_before = len(sent)
            resumed, credit = _resumed(request, sent), None
            try:
                credit = await self._credit(resumed, progress)
                async with aclosing(self._run_attempt(resumed, credit)) as events:
                    async for event in events:
                        if isinstance(event, Tokens):
                            sent.extend(event.token_ids)
                        elif isinstance(event, Prefilled) and not sent:
                            progress.waited_s += event.waited_s
                        yield event
                        if isinstance(event, Finished):
                            return
            except _ATTEMPT_ERRORS as error:
                # Prefill gives one token in every attempt; only more than that is progress. To wait is no failure.
                fruitless = fruitless + 1 if len(sent) <= sent_before + 1 and not isinstance(error, GaveWay) else 0
                if fruitless > self._max_restarts:
                    raise _final(error) from error
                progress.num_restarts += 1
                _log.warning("%s: computed again after %d tokens: %s", request.request_id, len(sent), error)
            finally:
                if credit is not None:
                    self._credits.give_back(credit)
            if sent and (finish := request.stopping.finish_after(sent[-1], len(sent))):
                yield Finished(finish)  # only the news of the end was lost
                return
            await self._sleep(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**fruitless))

    async def _credit(self, request: EngineRequest, progress: Progress) -> Credit:
        config = self._models[request.model]
        demand = kv_demand(request, config.block_size, config.kv_answer_tokens)
        asked_at_s = self._clock.monotonic_s()
        credit = await self._credits.wait_for_credit(request.model, request.standing, demand)
        credited_at_s = self._clock.monotonic_s()
        if progress.credited_at_s is None:
            progress.credited_at_s = credited_at_s
            progress.credit = credit
        if not request.resume_token_ids:
            progress.waited_s += credited_at_s - asked_at_s
        return credit


def _resumed(request: EngineRequest, sent: list[int]) -> EngineRequest:
    """The request as it goes on after the tokens that the client has; with them it has what the prompt gave."""
    if not sent:
        return request
    sampling = replace(request.sampling, prompt_logprobs=None)
    standing = request.standing.after(len(sent), request.prediction, prefill_again=True)
    return replace(request, resume_token_ids=tuple(sent), sampling=sampling, standing=standing)


def _final(error: MeshError) -> MeshError:
    """What the client is told after the last attempt."""
    return error if isinstance(error, Unavailable) else InternalError(f"the request failed repeatedly: {error}")
