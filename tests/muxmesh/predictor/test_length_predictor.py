import functools
import math
import operator
import random
import string

import numpy as np
import pytest

from muxmesh.errors import ConfigError
from muxmesh.predictor import snapshot
from muxmesh.predictor.checked_predictor import CheckedPredictor
from muxmesh.predictor.conformal_bound import ConformalBound
from muxmesh.predictor.length_predictor import Fitted, LengthPredictor, fit_now
from muxmesh.predictor.prompt_features import Reader, Reading
from muxmesh.predictor.rank_correlation import kendall_tau
from muxmesh.predictor.regression import Examples, fit
from muxmesh.predictor.retrieval import History, Scale

SHORT = ("Yes or no: is {} a fruit?", "Is {} one word? Answer briefly.", "Classify {} as true or false.")
LONG = ("Write a detailed essay about {}.", "Explain step by step how {} works, in depth.", "Write a long story of {}.")
THINGS = [f"{kind} {number}" for number in range(400) for kind in ("apple", "river", "engine", "market", "violin")]


def answers(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Prompts of two kinds, whose answers differ tenfold, with noise."""
    rng = random.Random(seed)
    found = []
    for thing in rng.sample(THINGS, count):
        long = rng.random() < 0.5
        prompt = rng.choice(LONG if long else SHORT).format(thing)
        found.append((prompt, max(1, round((300 if long else 20) * math.exp(rng.gauss(0, 0.4))))))
    return found


def taught(count: int = 300, model: str = "m", predictor: LengthPredictor | None = None) -> LengthPredictor:
    predictor = predictor or LengthPredictor()
    for prompt, length in answers(count):
        predictor.observe(predictor.predict(prompt, model), model, length, False)
        fit_now(predictor)
    return predictor


def test_before_the_first_answer_there_is_a_cold_guess() -> None:
    guess = LengthPredictor().predict("Hello", "m")
    assert guess.source == "cold" and 0 < guess.p50_tokens < guess.p90_tokens


def test_it_learns_to_rank_prompts_it_has_not_seen() -> None:
    predictor = taught()
    fresh = answers(500, seed=9)[300:]
    guesses = [predictor.predict(prompt, "m").p50_tokens for prompt, _ in fresh]
    assert kendall_tau(np.array(guesses), np.array([length for _, length in fresh], float)) > 0.5
    assert {predictor.predict(prompt, "m").source for prompt, _ in fresh} <= {"regressed", "retrieved"}


def test_the_bound_holds_nine_times_in_ten() -> None:
    predictor, rng, within = taught(), random.Random(3), []
    for place, (prompt, length) in enumerate(answers(1500, seed=4)):
        guess = predictor.predict(f"{prompt} {rng.random()}", "m")
        within += [length <= guess.p90_tokens] if place > 300 else []
        predictor.observe(guess, "m", length, False)
    assert np.mean(within) == pytest.approx(0.9, abs=0.03)


def test_what_one_model_answered_tells_of_another_that_talks_more() -> None:
    predictor = taught()
    for prompt, length in answers(60, seed=5):  # the other model's scale; other prompts than below
        predictor.observe(predictor.predict(prompt, "chatty"), "chatty", 4 * length, False)
    known, unknown = "Tell me of the zebra crossing", "Tell me of the zebra finch colony on the western moors"
    for _ in range(4):
        predictor.observe(predictor.predict(known, "m"), "m", 3000, False)
    guess = predictor.predict(known, "chatty")
    assert guess.source == "retrieved"
    assert guess.p50_tokens > 2 * predictor.predict(unknown, "chatty").p50_tokens


def test_a_censored_answer_counts_as_longer_than_it_got() -> None:
    lengths = []
    for censored in (False, True):
        predictor = taught(200)
        for number in range(60):
            prompt = f"Recite chapter {number} of the saga"
            predictor.observe(predictor.predict(prompt, "m"), "m", 64, censored)
        lengths.append(predictor.predict("Recite chapter 99 of the saga", "m").p50_tokens)
    assert lengths[1] > lengths[0]


def test_neighbours_are_those_that_looking_at_every_prompt_would_find() -> None:
    reader, history, rng = Reader(), History(), random.Random(4)
    words = ["".join(rng.choices(string.ascii_lowercase, k=4)) for _ in range(18)]
    texts = [" ".join(rng.choices(words[: rng.randint(2, 18)], k=rng.randint(1, 7))) for _ in range(600)]
    known = {text: reader.read(text) for text in texts[:500]}
    for place, (text, reading) in enumerate(known.items()):
        history.add(place, reading, "m", math.log(1 + len(text)))
    mean, deviation = history.scale("m")
    num_found = 0
    for text in texts:
        asked = reader.read(text)
        near = {other: (float(reading.words @ asked.words) - 0.9) / 0.1 for other, reading in known.items()}
        nearest = [other for other in near if near[other] > 1e-4]
        found = history.neighbours(asked)
        assert (found is None) is (not nearest)
        if found is not None and len(nearest) <= 16:  # of more it takes the nearest, and some are equally near
            weight = sum(near[other] ** 2 for other in nearest)
            lengths = sum(near[other] ** 2 * (math.log(1 + len(other)) - mean) / deviation for other in nearest)
            assert found.num_answers == pytest.approx(weight, rel=1e-3)
            assert found.mean == pytest.approx(lengths / weight, abs=1e-3)
            num_found += 1
    assert num_found > 100


def test_a_fit_that_ranks_worse_is_not_published() -> None:
    predictor = taught()
    rejected = predictor.num_rejected
    published, before = predictor.num_published, predictor.predict("Write a detailed essay about apple 3.", "m")
    refit = None
    for prompt, length in answers(200, seed=7):
        predictor.observe(predictor.predict(prompt, "m"), "m", length, False)
        refit = refit or predictor.refit()
    assert refit is not None
    fitted = refit.run()
    assert not predictor.publish(Fitted(fitted.fit, fitted.num_rows, tau=0.1, published_tau=0.5))
    assert predictor.num_published == published and predictor.num_rejected == rejected + 1
    assert before.source == predictor.predict("Write a detailed essay about apple 3.", "m").source


def test_a_fit_is_compared_on_examples_that_neither_has_seen() -> None:
    predictor = taught()
    rng = random.Random(1)
    refit = None
    while refit is None:  # lengths that nothing tells: a fit that had seen them would rank them
        prompt = f"Note {rng.random()}"
        predictor.observe(predictor.predict(prompt, "m"), "m", rng.randint(1, 500), False)
        refit = predictor.refit()
    fitted = refit.run()
    assert abs(fitted.tau) < 0.45 and abs(fitted.published_tau) < 0.45


def test_the_comparison_is_fair_where_many_models_answer_each_prompt() -> None:
    predictor = LengthPredictor()
    rng = random.Random(2)
    for prompt, length in answers(300, seed=3):
        guesses = [(model, predictor.predict(prompt, model)) for model in "abcdefgh"]
        for model, guess in guesses:
            predictor.observe(guess, model, max(1, round(length * rng.lognormvariate(0, 0.2))), False)
        fit_now(predictor)
    assert predictor.num_published > 2 * predictor.num_rejected


def test_held_out_predictions_are_those_of_a_fit_without_them() -> None:
    rng = np.random.default_rng(0)
    lexical, words = rng.normal(size=(60, 5)).astype(np.float32), rng.normal(0, 0.3, size=(60, 8)).astype(np.float32)
    targets, counts = rng.normal(size=60).astype(np.float32), np.ones(60, np.int32)
    whole = Examples(lexical, words, targets, counts)
    _, expected = fit(whole, 10)
    changed = targets.copy()
    changed[-10:] += 5  # what they were is not looked at
    _, again = fit(Examples(lexical, words, changed, counts), 10)
    assert np.allclose(expected, again, atol=1e-3)


def test_a_fit_is_the_regression_along_its_directions_written_out() -> None:
    rng = np.random.default_rng(1)
    lexical, words = rng.normal(2, 3, (301, 30)).astype(np.float32), rng.normal(0, 0.1, (301, 150)).astype(np.float32)
    targets, counts = rng.normal(size=300).astype(np.float32), rng.integers(1, 5, 300).astype(np.int32)
    fitted, held_out = fit(Examples(lexical[:300], words[:300], targets, counts), 20)
    assert fitted.directions.shape == (180, 128)
    standard = (lexical - lexical[:300].mean(0)) / (lexical[:300].std(0) + 1e-3)
    whole = np.concatenate([np.clip(standard, -4, 4) / 7, words * 0.85], axis=1).astype(np.float64)
    along = whole @ fitted.directions
    squares = np.square(whole).sum(1)
    distance = np.maximum(squares[:, None] + squares - 2 * along @ along.T, 0)
    kernel = (np.exp(-0.3 * distance) + np.exp(-1.2 * distance)) / 2
    known = kernel[:300, :300].copy()
    np.fill_diagonal(known, 1.0)
    assert np.linalg.eigvalsh(known)[0] >= 0
    known += np.diag(0.1 + 0.1 / counts)
    assert held_out == pytest.approx(known[280:, :280] @ np.linalg.solve(known[:280, :280], targets[:280]), abs=1e-4)
    expected = kernel[300, :300] @ np.linalg.solve(known, targets)
    assert fitted.predict(Reading(lexical[300], words[300]))[0] == pytest.approx(expected, abs=1e-4)


def test_the_history_keeps_the_latest_prompts_and_one_row_for_each() -> None:
    predictor = LengthPredictor(capacity=8)
    history = predictor.history
    for number in range(20):
        for _ in range(2):
            predictor.observe(predictor.predict(f"prompt number {number}", "m"), "m", 10 + number, False)
    assert len(history) == 8 and history.num_observed == 40
    examples = history.examples(5)
    assert len(examples) == 5 and list(examples.num_answers) == [2] * 5
    assert (np.diff(examples.targets) > 0).all()  # oldest first


def test_scales_forget_and_new_models_borrow() -> None:
    scale = Scale()
    for _ in range(3000):
        scale.add(2.0)
    for _ in range(3000):
        scale.add(5.0)
    assert scale.mean == pytest.approx(5, abs=0.05)
    assert Scale().towards(scale)[0] == pytest.approx(scale.mean)


def test_the_conformal_bound_follows_a_shift() -> None:
    bound, rng, missed = ConformalBound(), random.Random(0), []
    for place in range(4000):
        score = rng.gauss(0 if place < 2000 else 1.5, 1)
        missed.append(score > bound.bound)
        bound.observe(score, bound.bound)
    assert np.mean(missed[500:2000]) == pytest.approx(0.1, abs=0.03)
    assert np.mean(missed[2600:]) == pytest.approx(0.1, abs=0.03)


def test_kendall_tau_is_that_of_the_definition() -> None:
    assert kendall_tau(np.array([1.0, 2, 3]), np.array([10.0, 20, 30])) == 1
    assert kendall_tau(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == -1
    assert kendall_tau(np.array([1.0, 1, 1]), np.array([3.0, 2, 1])) == 0
    assert kendall_tau(np.array([1.0, 2, 2, 3]), np.array([1.0, 2, 3, 3])) == pytest.approx(4 / 5)


def test_a_restored_predictor_says_what_the_saved_one_said() -> None:
    predictor = taught()
    guard = CheckedPredictor(predictor)
    for prompt, length in answers(100, seed=11):
        guard.observe(guard.predict(prompt, "m", "tenant", 50), length, False)
    other, other_guard = snapshot.read(snapshot.write(snapshot.take(predictor, guard)))
    assert other.history.num_observed == predictor.history.num_observed
    assert other_guard.dump() == guard.dump()
    fit_now(predictor)  # as restoring does
    for prompt, _ in answers(20, seed=12):
        mine, theirs = predictor.predict(prompt, "m"), other.predict(prompt, "m")
        assert theirs.source == mine.source
        assert math.log(theirs.p50_tokens / mine.p50_tokens) == pytest.approx(0, abs=0.4)


@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_bytes_that_are_no_snapshot_are_refused_with_words(damage: str) -> None:
    saved = snapshot.write(snapshot.take(taught(50), CheckedPredictor(LengthPredictor())))
    damaged = {"empty": b"", "cut": saved[: len(saved) // 2], "text": b"hello"}[damage]
    with pytest.raises(ConfigError, match="snapshot is damaged"):
        snapshot.read(damaged)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("format", "0/1/2", "format 0/1/2, this version reads 1/"),
        ("guard", [], "damaged"),
        ("history/num", None, "damaged"),
        ("history/num", math.inf, "damaged"),
        ("history/everyone", [math.inf, 1, 1], "damaged: a scale is no number"),
        ("history/everyone", [{}, 1, 1], "damaged"),
        ("history/answers", [], "do not belong together"),
        ("scores", {"": ["x"]}, "damaged"),
        ("guard/ranks/m/constant_tokens", "40", "damaged"),
        ("guard/ranks/m/constant_tokens", math.nan, "damaged: nan is no number"),
        ("guard/ranks/m/scale", [1, 1], "damaged"),
        ("guard/ranks/m/scale", [1, 1, -1], "damaged: a scale is no number"),
        ("guard/ranks/m/guessed", ["1"], "damaged"),
        ("guard/trust", {"tenant": 3}, "damaged"),
    ],
)
def test_a_snapshot_that_says_something_else_is_refused_with_words(path: str, value: object, said: str) -> None:
    predictor = taught(50)
    guard = CheckedPredictor(predictor)
    guard.observe(guard.predict("x", "m"), 30, False)
    taken = snapshot.take(predictor, guard)
    *folders, name = path.split("/")
    into = functools.reduce(operator.getitem, folders, taken.state)
    assert name in into
    into[name] = value
    with pytest.raises(ConfigError, match=said):
        snapshot.read(snapshot.write(taken))


def test_an_answer_that_was_cut_off_early_teaches_nothing() -> None:
    predictor = taught(50)
    known = predictor.history.dump()[2]
    for number in range(50):
        predictor.observe(predictor.predict(f"another {number}", "m"), "m", 1, True)
    assert predictor.history.dump()[2] == known


def test_the_median_of_a_model_whose_long_answers_are_cut_off_is_no_shorter() -> None:
    """Half of the answers reach the cap, which is their median."""
    predictor, rng, guesses = LengthPredictor(), random.Random(2), []
    for number in range(600):
        guess = predictor.predict(f"prompt {number}", "m")
        guesses.append(guess.p50_tokens)
        length = math.exp(rng.gauss(4, 1))
        predictor.observe(guess, "m", round(min(length, math.exp(4))), length > math.exp(4))
    assert np.median(guesses[300:]) == pytest.approx(math.exp(4), rel=0.15)


@pytest.mark.parametrize("slope", [1 / 400, -1 / 400])
def test_the_median_follows_a_drift_in_both_directions(slope: float) -> None:
    bound, rng, missed = ConformalBound(0.5, 0.0), random.Random(0), []
    for place in range(4000):
        score = rng.gauss(slope * place, 1)
        missed.append(score > bound.bound)
        bound.observe(score, bound.bound)
    assert np.mean(missed[1000:]) == pytest.approx(0.5, abs=0.03)


def test_history_rejects_rows_of_another_shape() -> None:
    words, lexical, known = taught(40).history.dump()
    with pytest.raises(ValueError, match="belong together"):
        History().load(words[:, :-1], lexical, known)
