"""The forecaster with real predictors and threads. A predictor blocks on an event, so no test depends on speed."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from muxmesh.clock import ManualClock
from muxmesh.predictor.checked_predictor import CheckedPredictor
from muxmesh.predictor.length_predictor import LengthPredictor
from router.length_forecast import FIT_FRACTION, LengthForecast, LengthForecaster
from router.tenant_key import tenant_key
from tests.support.pipeline_parts import until

SECRET = b"secret of a mesh"


class BlockedPredictor(LengthPredictor):
    """Blocks in `predict` while ``release`` is not set."""

    def __init__(self, released: bool = False) -> None:
        super().__init__()
        self.entered, self.release = threading.Event(), threading.Event()
        self.num_calls = 0
        if released:
            self.release.set()

    def predict(self, text: str, model: str, tenant: str = "") -> Any:
        self.num_calls += 1
        self.entered.set()
        self.release.wait(30)
        return super().predict(text, model, tenant)


@contextmanager
def forecaster_of(
    predictor: LengthPredictor | CheckedPredictor, budget_s: float = 60.0, clock: ManualClock | None = None
) -> Iterator[LengthForecaster]:
    checked = CheckedPredictor(predictor) if isinstance(predictor, LengthPredictor) else predictor
    forecaster = LengthForecaster(checked, budget_s, clock or ManualClock(), SECRET)
    try:
        yield forecaster
    finally:
        forecaster.close()


async def forecast_for(forecaster: LengthForecaster, text: str = "Hello", model: str = "m") -> LengthForecast:
    return await forecaster.predict(text, model, "", None)


async def test_an_observed_length_changes_the_next_forecast() -> None:
    with forecaster_of(LengthPredictor()) as forecaster:
        first = await forecast_for(forecaster)
        assert (first.source, first.prediction.p50_tokens) == ("cold", 128)
        forecaster.observe(first, 40, False)
        again = await forecast_for(forecaster)
        assert again.source == "retrieved" and 30 < again.prediction.p50_tokens < 60
        assert again.checked is not None and again.checked.prediction == again.prediction


async def test_the_error_of_each_source_is_measured_on_outputs_that_ended_by_themselves() -> None:
    with forecaster_of(LengthPredictor()) as forecaster:
        first = await forecast_for(forecaster)
        for num_tokens, is_censored in ((64, False), (512, False), (7, True)):
            forecaster.observe(first, num_tokens, is_censored)
        cold = forecaster.log_error("m", "cold").value
        assert cold.sum == pytest.approx(math.log(2) + math.log(4)), "half and four times of 128"
        assert (cold.cumulative[-1], forecaster.log_error("m", "retrieved").value.cumulative[-1]) == (2, 0)


async def test_hint_and_tenant_reach_the_predictor_s_checks() -> None:
    with forecaster_of(LengthPredictor()) as forecaster:
        forecast = await forecaster.predict("Hello", "m", "tenant", 33)
        assert forecast.checked is not None
        assert (forecast.checked.tenant, forecast.checked.hint_tokens) == (tenant_key(SECRET, "tenant"), 33)


async def test_a_tenant_is_not_shown_what_only_another_one_asked() -> None:
    predictor = CheckedPredictor(LengthPredictor())
    for number in range(40):
        for text, tenant, num_tokens in ((f"prompt {number}", "", 100), ("Hello", "a", 3000)):
            known_as = tenant_key(SECRET, tenant)
            predictor.observe(predictor.predict(text, "m", known_as, None), num_tokens, False)
            if (refit := predictor.refit()) is not None:  # here, not in a thread: predictions depend on when it ends
                predictor.publish(refit.run())
    with forecaster_of(predictor) as forecaster:
        own, other = [await forecaster.predict("Hello", "m", tenant, None) for tenant in ("a", "b")]
    assert (own.source, other.source) == ("retrieved", "regressed")
    assert own.prediction.p50_tokens > 2000 and other.prediction.p50_tokens < 300


async def test_a_prediction_beyond_the_budget_is_not_used_and_no_other_request_waits_for_it() -> None:
    predictor = BlockedPredictor()
    with forecaster_of(predictor, budget_s=0.01) as forecaster:
        assert (await forecast_for(forecaster)).source == "late"
        forecasts = await asyncio.wait_for(asyncio.gather(*(forecast_for(forecaster) for _ in range(200))), 20)
        assert {(forecast.source, forecast.checked) for forecast in forecasts} == {("late", None)}
        assert forecaster.num_late == 201
        predictor.release.set()
        await forecaster.call(lambda: None)
    assert predictor.num_calls == 1


async def test_the_predictor_is_called_again_once_it_has_returned() -> None:
    predictor = BlockedPredictor()
    with forecaster_of(predictor, budget_s=0.01) as forecaster:
        assert (await forecast_for(forecaster)).source == "late"
        predictor.release.set()
        async with asyncio.timeout(20):
            while (await forecast_for(forecaster)).source != "cold":
                pass


async def test_a_late_forecast_is_the_mean_of_its_model() -> None:
    predictor = BlockedPredictor(released=True)
    checked = CheckedPredictor(predictor)
    for number in range(20):
        checked.observe(checked.predict(f"prompt {number}", "long", "", None), 1000, False)
    predictor.release.clear()
    with forecaster_of(checked, budget_s=0.01) as forecaster:
        unknown, first, second = [
            await forecast_for(forecaster, text, model) for text, model in (("a", "m"), ("b", "long"), ("c", "long"))
        ]
        assert [forecast.source for forecast in (unknown, first, second)] == ["late"] * 3
        assert unknown.prediction.p50_tokens == 128
        assert first.prediction == second.prediction and round(first.prediction.p50_tokens) == 1000
        predictor.release.set()


async def test_lateness_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    predictor = BlockedPredictor()
    with forecaster_of(predictor, budget_s=0.01) as forecaster:
        await asyncio.gather(*(forecast_for(forecaster) for _ in range(3)))
        predictor.release.set()
    (warning,) = [record for record in caplog.records if record.name == "router.length_forecast"]
    assert warning.levelno == logging.WARNING and "took more than 10 ms" in warning.message


async def test_an_output_whose_forecast_was_late_or_that_has_no_token_is_not_observed() -> None:
    predictor = LengthPredictor()
    with forecaster_of(predictor) as forecaster:
        forecast = await forecast_for(forecaster)
        forecaster.observe(LengthForecast(forecast.prediction, "late"), 40, False)
        forecaster.observe(forecast, 0, True)
        await forecaster.call(lambda: None)
        assert predictor.history.num_observed == 0


async def test_observations_do_not_pile_up_behind_a_predictor_that_hangs() -> None:
    predictor = LengthPredictor()
    release = threading.Event()
    with forecaster_of(predictor) as forecaster:
        forecast = await forecast_for(forecaster)
        blocked = asyncio.ensure_future(forecaster.call(lambda: release.wait(30)))
        await asyncio.sleep(0)
        for _ in range(1100):
            forecaster.observe(forecast, 40, False)
        release.set()
        await blocked
        await until(lambda: forecaster._num_pending == 0)
        assert predictor.history.num_observed == 1000
        forecaster.observe(forecast, 40, False)
        await forecaster.call(lambda: None)
        assert predictor.history.num_observed == 1001


async def test_after_close_every_forecast_is_late_and_nothing_is_observed() -> None:
    predictor = LengthPredictor()
    with forecaster_of(predictor) as forecaster:
        forecast = await forecast_for(forecaster)
        forecaster.close()
        assert (await forecast_for(forecaster)).source == "late"
        forecaster.observe(forecast, 40, False)
        with pytest.raises(asyncio.CancelledError):
            await forecaster.call(lambda: None)
        assert predictor.history.num_observed == 0


async def test_close_ends_the_wait_for_a_prediction_that_has_not_started() -> None:
    predictor = BlockedPredictor()
    with forecaster_of(predictor) as forecaster:
        running, queued = (asyncio.create_task(forecast_for(forecaster)) for _ in range(2))
        await until(predictor.entered.is_set)
        forecaster.close()
        assert (await asyncio.wait_for(queued, 20)).source == "late"
        predictor.release.set()
        assert (await asyncio.wait_for(running, 20)).source == "cold"


async def test_fits_run_beside_predictions_and_are_published() -> None:
    predictor = LengthPredictor()
    with forecaster_of(predictor) as forecaster:
        for number in range(80):
            forecast = await forecast_for(forecaster, f"prompt {number} about {number * 7}")
            forecaster.observe(forecast, 10 + number, False)
        async with asyncio.timeout(30):
            while predictor.num_published == 0:
                await forecaster.call(lambda: None)
        assert (await forecast_for(forecaster, "prompt 81")).source in ("regressed", "retrieved")


class FakeFit:
    """A fit that takes 2 s of the clock, and fails."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock

    def run(self) -> Any:
        self._clock.advance(2.0)
        raise MemoryError("no memory for a fit")


class FittingPredictor(LengthPredictor):
    """Has a fit due at each observation. Records when it was asked for one, and what was published."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self._clock = clock
        self.asked_at_s: list[float] = []
        self.published: list[Any] = []

    def refit(self) -> Any:
        self.asked_at_s.append(self._clock.monotonic_s())
        return FakeFit(self._clock)

    def publish(self, fitted: Any) -> bool:
        self.published.append(fitted)
        return False


async def test_fits_use_a_small_fraction_of_a_core_and_a_failed_one_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = ManualClock(100.0)
    predictor = FittingPredictor(clock)
    with forecaster_of(predictor, clock=clock) as forecaster:

        async def observe() -> None:
            forecaster.observe(await forecast_for(forecaster), 40, False)
            await forecaster.call(lambda: None)

        await observe()
        await until(lambda: predictor.published == [None])
        await observe()
        clock.advance(2.0 / FIT_FRACTION - 0.5)
        await observe()
        assert predictor.asked_at_s == [100.0], "the next fit is due 100 s after one of 2 s"
        clock.advance(0.5)
        await observe()
        assert predictor.asked_at_s == [100.0, 202.0]
        await until(lambda: len(predictor.published) == 2)
    assert "a fit of the length predictor failed: no memory for a fit" in caplog.text


class StopClock(ManualClock):
    """A clock of threads that were stopped for all but a hundredth of the time."""

    def thread_cpu_s(self) -> float:
        return self.monotonic_s() / 100


async def test_time_for_which_a_fit_was_stopped_does_not_postpone_the_next() -> None:
    clock = StopClock(100.0)
    predictor = FittingPredictor(clock)
    with forecaster_of(predictor, clock=clock) as forecaster:
        for num_fits in (1, 2):
            forecaster.observe(await forecast_for(forecaster), 40, False)
            await until(lambda num_fits=num_fits: len(predictor.published) == num_fits)  # type: ignore[misc]
            clock.advance(0.02 / FIT_FRACTION)
        assert predictor.asked_at_s == [100.0, 103.0]


class NoRefitPredictor(LengthPredictor):
    """Fails whenever it is asked for a fit."""

    def refit(self) -> Any:
        raise MemoryError


async def test_a_predictor_that_cannot_fit_still_predicts() -> None:
    with forecaster_of(NoRefitPredictor()) as forecaster:
        for _ in range(3):
            forecaster.observe(await forecast_for(forecaster), 10, False)
        assert (await forecast_for(forecaster)).source == "retrieved"


async def test_ranking_is_reported_by_model() -> None:
    with forecaster_of(LengthPredictor()) as forecaster:
        assert (forecaster.tau("m"), forecaster.is_ranking("m")) == (None, True)
        for number in range(120):
            text = f"prompt {number % 2}" * (number % 2 + 1)
            forecaster.observe(await forecast_for(forecaster, text), 10 + 500 * (number % 2), False)
            await forecaster.call(lambda: None)
        tau = forecaster.tau("m")
        assert tau is not None and tau > 0.5 and forecaster.is_ranking("m")
        assert forecaster.tau("n") is None
