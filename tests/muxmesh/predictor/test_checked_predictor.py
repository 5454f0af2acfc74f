import math
import random
from collections.abc import Callable

import pytest

from muxmesh.predictor.checked_predictor import CheckedPredictor
from muxmesh.predictor.length_predictor import Fitted, Guess, Refit
from muxmesh.predictor.prompt_features import Reader

READING = Reader().read("x")


class Says:
    """A predictor whose guess is a function of the prompt, which is a number here."""

    def __init__(self, guess: Callable[[float], float]) -> None:
        self.guess = guess
        self.num_learned = 0

    def predict(self, text: str, model: str) -> Guess:
        tokens = self.guess(float(text))
        return Guess(tokens, tokens * 2, "regressed", READING, 0, 1.0, 1.6)

    def observe(self, guess: Guess, model: str, num_tokens: int, censored: bool) -> None:
        self.num_learned += 1

    def refit(self) -> Refit | None:
        return None

    def publish(self, fitted: Fitted | None) -> bool:
        return True


def crash(truth: float) -> float:
    raise RuntimeError("no guess today")


def run(
    guard: CheckedPredictor, count: int, seed: int = 0, tenant: str = "", hint: Callable[[int], int] | None = None
) -> list[str]:
    """Sends requests whose prompts tell their own lengths; where each prediction came from."""
    rng, sources = random.Random(seed), []
    for _ in range(count):
        truth = max(1, round(math.exp(rng.gauss(4, 1))))
        judged = guard.predict(str(truth), "m", tenant, hint(truth) if hint else None)
        assert math.isfinite(judged.prediction.p50_tokens)
        assert 0 < judged.prediction.p50_tokens <= judged.prediction.p90_tokens
        guard.observe(judged, truth, False)
        sources.append(judged.source)
    return sources


RNG = random.Random(5)
USELESS: dict[str, Callable[[float], float]] = {
    "one": lambda truth: 1.0,
    "huge": lambda truth: 1e300,
    "random": lambda truth: RNG.lognormvariate(4, 1),
    "reversed": lambda truth: 1e6 / truth,
}


@pytest.mark.parametrize("kind", USELESS)
def test_guesses_that_do_not_rank_are_not_used(kind: str) -> None:
    guard = CheckedPredictor(Says(USELESS[kind]))
    sources = run(guard, 600)
    assert set(sources[-100:]) == {"floor"} and not guard.is_ranking("m")
    constants = {guard.predict(str(truth), "m").prediction.p50_tokens for truth in (1, 50, 4000)}
    assert len(constants) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -5.0])
def test_a_guess_that_is_no_length_is_replaced_by_the_typical_one(bad: float) -> None:
    predictor = Says(lambda truth: truth)
    guard = CheckedPredictor(predictor)
    run(guard, 100)
    predictor.guess = lambda truth: bad
    assert set(run(guard, 100)) == {"failed"}
    assert guard.num_failures == 100
    assert guard.predict("7", "m").prediction.p50_tokens == pytest.approx(math.exp(4), rel=0.3)


@pytest.mark.parametrize("nonsense", [None, "many", 7])
def test_a_guess_that_is_no_guess_at_all_is_replaced_too(nonsense: object, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Says(lambda truth: truth)
    monkeypatch.setattr(predictor, "predict", lambda text, model: nonsense)
    assert set(run(CheckedPredictor(predictor), 10)) == {"failed"}


def test_while_guesses_fail_all_lengths_are_the_same() -> None:
    guard = CheckedPredictor(Says(crash))
    lengths = set()
    for truth in range(1, 300):
        judged = guard.predict("x", "m")
        lengths.add(judged.prediction.p50_tokens)
        guard.observe(judged, truth, False)
    assert len(lengths) == 1


def test_a_predictor_that_crashes_costs_nothing_but_its_guess() -> None:
    assert set(run(CheckedPredictor(Says(crash)), 50)) == {"failed"}


def test_a_predictor_that_ranks_again_is_used_again() -> None:
    predictor = Says(USELESS["one"])
    guard = CheckedPredictor(predictor)
    run(guard, 200)
    predictor.guess = lambda truth: truth
    assert run(guard, 400)[-1] == "regressed" and predictor.num_learned == 600


def test_a_good_predictor_stays_in_use() -> None:
    rng = random.Random(8)
    guard = CheckedPredictor(Says(lambda truth: truth * rng.lognormvariate(0, 1)))
    assert set(run(guard, 1000)) == {"regressed"}
    assert (guard.tau("m") or 0) > 0.3


def poor() -> CheckedPredictor:
    rng = random.Random(8)
    return CheckedPredictor(Says(lambda truth: truth**0.5 * 8 * rng.lognormvariate(0, 1)))


def test_hints_that_prove_right_are_believed() -> None:
    guard = poor()
    run(guard, 30, tenant="honest", hint=lambda truth: truth)
    judged = guard.predict("9", "m", "honest", 900)
    assert judged.source == "hint"
    assert judged.prediction.p50_tokens == pytest.approx(900, rel=0.25)


def test_a_tenant_that_lies_gains_nothing() -> None:
    guard = poor()
    run(guard, 30, tenant="liar", hint=lambda truth: 1)
    with_hint, without = guard.predict("90", "m", "liar", 1), guard.predict("90", "m")
    assert with_hint.source == "regressed"
    assert with_hint.prediction.p50_tokens / without.prediction.p50_tokens > 0.02  # the guess itself is drawn
    sources = run(guard, 200, tenant="liar", hint=lambda truth: 1)
    assert "hint" not in sources


def test_a_tenant_that_begins_to_lie_loses_what_it_had_earned() -> None:
    guard = poor()
    run(guard, 30, tenant="t", hint=lambda truth: truth)
    sources = run(guard, 60, tenant="t", hint=lambda truth: 1)
    assert sources[0] == "hint" and sources.index("regressed") <= 10
    assert "hint" not in sources[10:]


def test_a_lie_shows_even_in_an_answer_that_was_cut_off() -> None:
    guard = poor()
    run(guard, 30, tenant="t", hint=lambda truth: truth)
    for _ in range(10):
        guard.observe(guard.predict("800", "m", "t", 1), 800, True)
    assert guard.predict("800", "m", "t", 1).source == "regressed"


def test_a_hint_that_was_longer_than_a_cut_off_answer_may_have_been_right() -> None:
    guard = poor()
    run(guard, 30, tenant="t", hint=lambda truth: truth)
    for _ in range(10):
        guard.observe(guard.predict("800", "m", "t", 900), 100, True)
    assert guard.predict("800", "m", "t", 900).source == "hint"


def test_the_first_hints_of_a_stranger_are_not_believed() -> None:
    sources = run(poor(), 4, tenant="stranger", hint=lambda truth: 1)
    assert "hint" not in sources


def test_censored_answers_judge_nobody() -> None:
    guard = CheckedPredictor(Says(USELESS["one"]))
    for _ in range(300):
        guard.observe(guard.predict("50", "m"), 50, True)
    assert guard.is_ranking("m") and guard.tau("m") is None


def test_each_model_is_judged_by_itself() -> None:
    guard = CheckedPredictor(Says(lambda truth: truth))
    run(guard, 200)
    for truth in range(1, 200):
        guard.observe(guard.predict(str(10_000 - truth), "other"), truth, False)
    assert guard.is_ranking("m") and not guard.is_ranking("other")
