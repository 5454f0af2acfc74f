import asyncio
import threading

import pytest

from muxmesh.clock import SystemClock
from muxmesh.predictor.guard import Guard
from muxmesh.predictor.predictor import Guess, LengthPredictor, Refit
from muxmesh.types import LengthPrediction, Standing, Stopping
from router.forecast import Forecaster
from router.work import fixed_length, typical_work, with_work, within


class Stuck(LengthPredictor):
    """Hangs in its first guess until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()

    def predict(self, text: str, model: str) -> Guess:
        """See `Predictor`."""
        self.let_go.wait(30)
        return super().predict(text, model)


def forecaster(predictor: LengthPredictor, budget_s: float = 5.0) -> Forecaster:
    return Forecaster(predictor, Guard(predictor), budget_s, SystemClock())


async def test_a_guess_comes_and_what_is_learned_shows() -> None:
    predictor = LengthPredictor()
    of = forecaster(predictor)
    first = await of.predict("Hello", "m", "", None)
    assert first.source == "cold"
    of.observe(first, 40, False)
    again = await of.predict("Hello", "m", "", None)
    assert again.source == "retrieved" and 30 < again.prediction.p50_tokens < 60
    of.close()


async def test_a_guess_that_hangs_is_done_without_and_nobody_else_waits_for_it() -> None:
    predictor = Stuck()
    of = forecaster(predictor, budget_s=0.05)
    assert (await of.predict("a", "m", "", None)).source == "late"
    answered = await asyncio.wait_for(asyncio.gather(*(of.predict("b", "m", "", None) for _ in range(200))), 5)
    assert {one.source for one in answered} == {"late"} and of.num_late == 201
    predictor.let_go.set()
    await of.call(lambda: None)  # the late guess has come
    assert (await of.predict("c", "m", "", None)).source == "cold"
    of.close()


async def test_late_forecasts_are_equal_so_that_the_order_is_arrival() -> None:
    predictor = Stuck()
    of = forecaster(predictor, budget_s=0.05)
    answered = [await of.predict(text, "m", "", None) for text in ("a", "write a long essay")]
    assert answered[0].prediction == answered[1].prediction
    predictor.let_go.set()
    of.close()


async def test_fits_are_made_beside_and_published() -> None:
    predictor = LengthPredictor()
    of = forecaster(predictor)
    for number in range(80):
        forecast = await of.predict(f"prompt {number} about {number * 7}", "m", "", None)
        of.observe(forecast, 10 + number, False)
    async with asyncio.timeout(30):
        while predictor.num_published == 0:
            await of.call(lambda: None)
            await asyncio.sleep(0.01)
    assert (await of.predict("prompt 81", "m", "", None)).source in ("regressed", "retrieved")
    of.close()


class NoFit(LengthPredictor):
    """Cannot even say whether a fit is due."""

    def refit(self) -> Refit | None:
        """See `Predictor`."""
        raise MemoryError


async def test_a_predictor_that_cannot_fit_goes_on_predicting() -> None:
    of = forecaster(NoFit())
    for _ in range(3):
        of.observe(await of.predict("Hello", "m", "", None), 10, False)
    assert (await of.predict("Hello", "m", "", None)).source == "retrieved"
    of.close()


@pytest.mark.parametrize(
    ("stopping", "stop_strings", "fixed"),
    [
        (Stopping(50, eos_token_ids=frozenset({2})), False, None),
        (Stopping(50), False, 50),
        (Stopping(50), True, None),
        (Stopping(50, min_new_tokens=50, eos_token_ids=frozenset({2})), False, 50),
        (Stopping(50, stop_token_ids=frozenset({7})), False, None),
    ],
)
def test_a_request_that_fixes_its_length_needs_no_guess(
    stopping: Stopping, stop_strings: bool, fixed: int | None
) -> None:
    assert fixed_length(stopping, stop_strings) == fixed


def test_a_prediction_stays_within_the_request_s_own_limits() -> None:
    assert within(LengthPrediction(100, 900), Stopping(300)) == LengthPrediction(100, 300)
    assert within(LengthPrediction(5, 9), Stopping(300, min_new_tokens=50)) == LengthPrediction(50, 50)


def test_more_tokens_are_more_work() -> None:
    def work(p50: float, prompt: int) -> float:
        return with_work(Standing(0, 0.0), LengthPrediction(p50, 2 * p50), prompt, None, 128, typical_work()).left_s

    assert work(10, 10) < work(100, 10) < work(100, 1000)
