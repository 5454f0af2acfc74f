"""Load-test targets with known latencies, driven in virtual time, so that every figure can be computed beforehand."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from loadtest.drive import Driver
from loadtest.record import Run
from loadtest.spec import parse_spec
from loadtest.target import Piece, ServedModel, StreamEnd, TargetError
from loadtest.workload import PlannedRequest, plan
from tests.support.virtual_time import VirtualClock, run_virtually

VOCABULARY = range(10, 100)
SERVED = (ServedModel("m", VOCABULARY),)
WORKLOAD = "rate=20 lengths=U(10,50)/(2,40) requests=2000 seed=3"


@dataclass(frozen=True, slots=True)
class Served:
    """When a request began and when each of its tokens was sent."""

    start_s: float
    times_s: list[float]


@dataclass
class StubTarget:
    """Serves with random latencies and records them in ``served``, by index of the request.

    The server pauses from ``stall_at_s`` on for ``stall_s``. ``failure`` chooses the requests that fail.
    """

    seed: int = 0
    spread: float = 0.7
    stall_at_s: float = math.inf
    stall_s: float = 0.0
    name: str = "stub"
    served_models: tuple[ServedModel, ...] = SERVED
    failure: Callable[[PlannedRequest], TargetError | None] = lambda request: None
    served: dict[int, Served] = field(default_factory=dict)
    received: list[PlannedRequest] = field(default_factory=list)
    num_aborted: int = 0

    async def models(self) -> list[ServedModel]:
        return list(self.served_models)

    async def stream(self, request: PlannedRequest) -> AsyncGenerator[Piece | StreamEnd, None]:
        self.received.append(request)
        rng = random.Random(f"{self.seed}/{request.index}")
        first_s = rng.lognormvariate(-2, self.spread)
        gaps_s = [rng.expovariate(20) for _ in range(request.max_new_tokens - 1)]
        start_s = VirtualClock().monotonic_s()
        if (error := self.failure(request)) is not None:
            await asyncio.sleep(0.01)
            raise error
        times_s: list[float] = []
        try:
            for gap_s in (first_s, *gaps_s):
                times_s.append(await self._sleep(gap_s))
                yield Piece(1)
        except (asyncio.CancelledError, GeneratorExit):
            self.num_aborted += 1
            raise
        self.served[request.index] = Served(start_s, times_s)
        yield StreamEnd(len(request.prompt), request.max_new_tokens, "length")

    async def _sleep(self, seconds: float) -> float:
        clock = VirtualClock()
        await asyncio.sleep(seconds)
        if self.stall_at_s <= clock.monotonic_s() < self.stall_at_s + self.stall_s:
            await asyncio.sleep(self.stall_at_s + self.stall_s - clock.monotonic_s())
        return clock.monotonic_s()

    async def close(self) -> None:
        return


class LinearTarget(StubTarget):
    """Takes 0.1 s, 1 ms per prompt token and 20 ms per output token; longer by ``slowdown`` per concurrent request."""

    def __init__(self, slowdown: float = 0.0, served_models: tuple[ServedModel, ...] = SERVED) -> None:
        super().__init__(served_models=served_models)
        self.num_running = 0
        self.slowdown = slowdown

    async def stream(self, request: PlannedRequest) -> AsyncGenerator[Piece | StreamEnd, None]:
        self.received.append(request)
        self.num_running += 1
        factor = 1 + self.slowdown * (self.num_running - 1)
        await asyncio.sleep(factor * (0.1 + 0.001 * len(request.prompt)))
        for _ in range(request.max_new_tokens):
            await asyncio.sleep(factor * 0.02)
            yield Piece(1)
        self.num_running -= 1
        yield StreamEnd(len(request.prompt), request.max_new_tokens, "length")


def drive(target: StubTarget, line: str = WORKLOAD, max_concurrency: int | None = None) -> Run:
    """Drives the workload ``line`` in virtual time."""

    async def work() -> Run:
        requests = plan(parse_spec(line), VOCABULARY)
        return await Driver(target, requests, VirtualClock(), max_concurrency).run()

    return run_virtually(work())
