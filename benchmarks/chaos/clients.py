"""Sends requests through the public client and records what comes back. Judges nothing (`checker`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from typing import Any

from benchmarks.chaos.cases import Case, Request
from benchmarks.chaos.history import CANCELLED, COMPLETED, ENDLESS, Call, SequenceSeen
from muxmesh.client import NO_RETRIES, MeshClient
from muxmesh.errors import MeshError, Unavailable

_RETRY_AFTER_S = 0.3


class Load:
    """Clients that send one request after the other until `stop`, and the calls that they made."""

    def __init__(self, address: str, call_limit_s: float) -> None:
        """``call_limit_s``: see `LoadSize`."""
        self.calls: list[Call] = []
        self.num_requests = 0
        self.num_retries = 0
        self.num_given_up = 0
        self._address = address
        self._call_limit_s = call_limit_s
        self._started_at_s = time.monotonic()
        self._is_stopped = False

    @property
    def at_s(self) -> float:
        """Seconds since the load started."""
        return time.monotonic() - self._started_at_s

    def stop(self) -> None:
        """Clients end after the request that they have sent."""
        self._is_stopped = True

    async def run_clients(self, streams: Sequence[Iterator[Request]]) -> None:
        """One client for each stream of requests. Every second one repeats failed calls as `MeshClient` does."""
        await asyncio.gather(*(self._run_client(requests, number % 2 == 0) for number, requests in enumerate(streams)))

    async def call_all(self, cases: Sequence[Case], at_once: int) -> list[Call]:
        """Sends each case once, ``at_once`` at a time; these calls are not added to ``calls``."""
        limit = asyncio.Semaphore(at_once)

        async def one(client: MeshClient, case: Case) -> Call:
            async with limit:
                return await self._call(client, Request(case))

        async with MeshClient(self._address) as client:
            return await asyncio.gather(*(one(client, case) for case in cases))

    def _client(self, retries: bool) -> MeshClient:
        return MeshClient(self._address) if retries else MeshClient(self._address, retries=NO_RETRIES)

    async def _run_client(self, requests: Iterator[Request], retries: bool) -> None:
        client = self._client(retries)
        try:
            for request in requests:
                await asyncio.sleep(request.pause_s)
                if self._is_stopped:
                    return
                self.num_requests += 1
                give_up_at_s = self.at_s + self._call_limit_s
                while await self._send(client, request) == Unavailable.__name__:
                    if self.at_s > give_up_at_s:
                        self.num_given_up += 1
                        break
                    self.num_retries += 1
                    await client.close()
                    client = self._client(retries)
                    await asyncio.sleep(_RETRY_AFTER_S)
        finally:
            await client.close()

    async def _send(self, client: MeshClient, request: Request) -> str:
        call = await self._call(client, request)
        self.calls.append(call)
        return call.end

    async def _call(self, client: MeshClient, request: Request) -> Call:
        started_at_s, end, problem = self.at_s, COMPLETED, ""
        seen: dict[str, Any] = {}
        sequences: dict[int, SequenceSeen] = {}
        try:
            async with asyncio.timeout(request.cancel_after_s or self._call_limit_s):
                await _receive(client, request, sequences, seen)
        except TimeoutError:
            end = ENDLESS if request.cancel_after_s is None else CANCELLED
        except MeshError as error:
            end, problem = type(error).__name__, str(error)
        return Call(request, started_at_s, self.at_s, end, problem, sequences, **seen)


async def _receive(
    client: MeshClient, request: Request, sequences: dict[int, SequenceSeen], seen: dict[str, Any]
) -> None:
    """Fills ``sequences`` and the fields of the call in ``seen`` while the stream lasts."""
    case = request.case
    options = {**case.options, **request.options, "model": case.model, "timeout_s": request.timeout_s}
    async with aclosing(client.stream(case.prompt, **options)) as deltas:
        async for delta in deltas:
            sequences[delta.index] = sequences.get(delta.index, SequenceSeen()).plus(delta)
            if delta.prompt is not None:
                seen.update(
                    num_prompt_tokens=delta.prompt.num_tokens,
                    seed=delta.prompt.seed,
                    prompt_logprobs=delta.prompt.logprobs,
                )
            if delta.timings is not None:
                seen.update(num_restarts=delta.timings.num_restarts)
