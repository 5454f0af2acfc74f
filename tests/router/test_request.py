"""The driver across attempts, with attempts that end as the test says."""

from collections.abc import AsyncGenerator
from typing import Any

import pytest

from muxmesh.clock import ManualClock
from muxmesh.config.schema import ModelConfig
from muxmesh.engine.api import Finished, Tokens
from muxmesh.errors import EngineFailed, InternalError, InvalidRequest, LeaseLost, MeshError, WorkerLost
from muxmesh.types import EngineRequest, Finish, FinishReason, KvDemand, LeaseRef, Sampling, Standing, Stopping
from router.credits import Credit
from router.request import Progress, RequestDriver

REQUEST = EngineRequest("r", "m", (40, 41), Sampling(), Stopping(6), Standing(0, 0.0))
END = Finished(Finish(FinishReason.LENGTH))
Script = list[list[int | MeshError | Finished]]


class Credits:
    """Gives a credit to everyone, and counts."""

    def __init__(self) -> None:
        self.out = 0

    async def wait_for_credit(self, model: str, standing: Standing, demand: KvDemand) -> Credit:
        assert demand.num_tokens == 8
        self.out += 1
        return Credit(LeaseRef(self.out, 1), "p", "", "d", "")

    def give_back(self, credit: Credit) -> None:
        self.out -= 1


async def run(script: Script, max_restarts: int = 2) -> tuple[list[Any], Progress]:
    """Events that the driver gives when its attempts do what each line of ``script`` says."""
    attempts = iter(script)

    async def attempt(request: EngineRequest, credit: Credit) -> AsyncGenerator[Tokens | Finished, None]:
        place = len(request.resume_token_ids)
        for act in next(attempts):
            if isinstance(act, int):
                yield Tokens(place, (act,))
                place += 1
            elif isinstance(act, Finished):
                yield act
            else:
                raise act

    async def no_wait(seconds: float) -> None:
        assert 0 < seconds <= 2.0

    progress, unit_credits = Progress(), Credits()
    driver = RequestDriver(unit_credits, attempt, {"m": ModelConfig(name="m")}, ManualClock(5.0), max_restarts, no_wait)  # type: ignore[arg-type]
    events = [event async for event in driver.run(REQUEST, progress)]
    assert unit_credits.out == 0, "a credit was not given back"
    assert progress.credited_at_s == 5.0
    return events, progress


def tokens(events: list[Any]) -> list[tuple[int, int]]:
    return [(event.start_index, event.token_ids[0]) for event in events if isinstance(event, Tokens)]


async def test_a_lost_worker_is_made_good_with_every_token_once() -> None:
    script: Script = [[7, 8, WorkerLost("gone")], [LeaseLost("late")], [9, 10, 11, 12, END]]
    events, progress = await run(script)
    assert tokens(events) == [(0, 7), (1, 8), (2, 9), (3, 10), (4, 11), (5, 12)]
    assert events[-1] == END
    assert progress.num_restarts == 2


async def test_an_answer_that_was_complete_is_not_computed_again() -> None:
    events, _ = await run([[1, 2, 3, 4, 5, 6, WorkerLost("gone")]])
    assert events[-1] == END
    assert len(tokens(events)) == 6


async def test_attempts_that_get_nowhere_are_given_up() -> None:
    with pytest.raises(WorkerLost, match="third"):
        await run([[WorkerLost("first")], [WorkerLost("second")], [WorkerLost("third")]])


async def test_a_request_that_fails_after_its_first_token_each_time_is_given_up() -> None:
    with pytest.raises(InternalError, match="failed repeatedly: nan"):
        await run([[7, EngineFailed("nan")], [8, EngineFailed("nan")], [9, EngineFailed("nan")]])


async def test_progress_starts_the_count_anew() -> None:
    script: Script = [[WorkerLost("")], [WorkerLost("")], [1, 2, WorkerLost("")], [WorkerLost("")], [3, 4, 5, 6, END]]
    _, progress = await run(script)
    assert progress.num_restarts == 4


async def test_bad_input_is_not_tried_again() -> None:
    with pytest.raises(InvalidRequest):
        await run([[InvalidRequest("stopping.max_new_tokens", "too many")]])
