from collections.abc import Callable

import pytest

from muxmesh.clock import ManualClock
from muxmesh.engine.api import Failed
from muxmesh.engine.scheduler import Scheduler
from muxmesh.engine.sim_runner import SimRunner, sim_step_cost
from muxmesh.engine.step import Step, StepOutcome
from muxmesh.errors import EngineFailed
from muxmesh.profiler.step_timer import StepTimer
from muxmesh.types import Role
from tests.support.virtual_timer import BLOCK_SIZE, MAX_MODEL_LEN, PROFILE, step_timer

COST = sim_step_cost(PROFILE)


@pytest.mark.parametrize(("batch", "length"), [(1, 100), (1, 300), (4, 64)])
def test_a_prefill_takes_all_its_chunks(batch: int, length: int) -> None:
    samples = step_timer(ManualClock()).samples(Role.PREFILL, batch, length, repeats=3, longest_s=60)
    num_steps = -(-batch * length // 128)
    context = batch * length * (length - 1) / 2
    expected = num_steps * PROFILE.base_s + batch * length * PROFILE.per_token_s + context * PROFILE.per_context_s
    assert samples == pytest.approx([expected] * 3)


@pytest.mark.parametrize("max_steps", [1, 16])
def test_a_decode_is_one_step_of_all_sequences_at_their_length(max_steps: int) -> None:
    samples = step_timer(ManualClock(), max_steps=max_steps).samples(Role.DECODE, 8, 500, repeats=5, longest_s=60)
    at_length, later = (COST.step_s(8, 8 * tokens) for tokens in (500, 600))
    assert len(samples) >= 5
    assert all(at_length <= sample <= later for sample in samples)


def test_a_decode_goes_on_after_its_sequences_are_as_long_as_they_may_be() -> None:
    samples = step_timer(ManualClock()).samples(Role.DECODE, 2, MAX_MODEL_LEN - 3, repeats=100, longest_s=600)
    assert len(samples) == 100
    assert samples == pytest.approx([COST.step_s(2, 2 * MAX_MODEL_LEN)] * 100, rel=0.01)


def test_short_steps_are_repeated_more_often_and_long_ones_less() -> None:
    timer = step_timer(ManualClock())
    assert len(timer.samples(Role.DECODE, 1, 64, repeats=2, longest_s=60)) > 20
    assert len(timer.samples(Role.PREFILL, 1, 1000, repeats=5, longest_s=30)) == 4
    assert len(timer.samples(Role.PREFILL, 1, 1000, repeats=5, longest_s=6)) == 1


def test_the_pause_of_a_share_is_part_of_a_step() -> None:
    clock = ManualClock()
    timer = step_timer(clock, pause=lambda: clock.advance(1.0))
    assert timer.samples(Role.DECODE, 1, 64, 1, 60)[0] == pytest.approx(COST.step_s(1, 64) + 1.0, rel=0.01)


def test_only_repetitions_inside_the_interval_count() -> None:
    clock = ManualClock(50.0)
    found = step_timer(clock).intervals(Role.DECODE, 1, 64, 51.0, 52.0)
    assert found[0][0] >= 51.0 and found[-1][1] < 52.0
    assert clock.monotonic_s() >= 52.0
    assert sum(end - start for start, end in found) == pytest.approx(1.0, abs=0.03)


def test_each_of_the_steps_that_are_computed_in_a_row_has_its_part_of_the_interval() -> None:
    found = step_timer(ManualClock(50.0), max_steps=16).intervals(Role.DECODE, 8, 500, 51.0, 53.0)
    at_length, later = (COST.step_s(8, 8 * tokens) for tokens in (500, 600))
    assert len(found) > 16
    assert all(at_length * 0.999 <= end - start <= later * 1.001 for start, end in found)


def test_blocks_are_filled_before_they_are_read() -> None:
    filled: list[int] = []
    clock = ManualClock()
    runner = SimRunner(PROFILE, range(35, 93), 0, clock.advance)
    timer = StepTimer(Scheduler(16, 128, 259), runner, BLOCK_SIZE, MAX_MODEL_LEN, clock, filled.append)
    timer.samples(Role.PREFILL, 3, 31, 1, 1)
    assert set(filled) == {3 * 2}


class _FailingRunner:
    max_steps = 1

    def unload(self, drop_weights: bool) -> None: ...

    def load(self) -> None: ...

    def run(self, step: Step, may_continue: Callable[[], bool]) -> StepOutcome:
        return StepOutcome({}, failed={chunk.job_id: Failed("logits are not finite") for chunk in step.chunks})


def test_a_step_that_fails_ends_the_measurement() -> None:
    timer = StepTimer(Scheduler(16, 128, 259), _FailingRunner(), BLOCK_SIZE, MAX_MODEL_LEN, ManualClock())
    with pytest.raises(EngineFailed, match="logits are not finite"):
        timer.samples(Role.DECODE, 1, 64, 1, 1)
