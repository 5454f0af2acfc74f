import asyncio
import threading

from muxmesh.clock import SystemClock
from muxmesh.predictor.checked_predictor import CheckedPredictor
from muxmesh.predictor.length_predictor import Guess, LengthPredictor, Refit
from router.length_forecast import LengthForecaster


class Stuck(LengthPredictor):
    """Hangs in its first guess until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()

    def predict(self, text: str, model: str) -> Guess:
        """See `Predictor`."""
        self.let_go.wait(30)
        return super().predict(text, model)


def forecaster(predictor: LengthPredictor, budget_s: float = 5.0) -> LengthForecaster:
    return LengthForecaster(CheckedPredictor(predictor), budget_s, SystemClock())


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


async def test_a_late_answer_is_taken_for_a_typical_one_of_its_model() -> None:
    predictor = Stuck()
    predictor.let_go.set()
    guard = CheckedPredictor(predictor)
    for number in range(20):
        guard.observe(guard.predict(f"prompt {number}", "long", "", None), 1000, False)
    predictor.let_go.clear()
    of = LengthForecaster(guard, 0.05, SystemClock())
    answered = [await of.predict(text, model, "", None) for text, model in (("a", "m"), ("b", "long"), ("c", "long"))]
    assert [one.source for one in answered] == ["late"] * 3
    assert answered[0].prediction.p50_tokens == 128
    assert answered[1].prediction == answered[2].prediction and round(answered[1].prediction.p50_tokens) == 1000
    predictor.let_go.set()
    of.close()


async def test_a_request_at_the_end_of_the_mesh_gets_a_forecast_too() -> None:
    of = forecaster(LengthPredictor())
    of.close()
    assert (await of.predict("a", "m", "", None)).source == "late"


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
