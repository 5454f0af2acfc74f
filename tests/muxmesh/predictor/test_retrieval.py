import json
import math
import random
import string
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.predictor.prompt_features import LEXICAL_NAMES, WORD_DIM, FeatureExtractor, PromptFeatures
from muxmesh.predictor.retrieval import History, LengthStats

EXTRACTOR = FeatureExtractor()


def features(number: int) -> PromptFeatures:
    """Features of prompt ``number``; word vectors of different prompts are nearly orthogonal."""
    words = np.random.default_rng(number).standard_normal(WORD_DIM).astype(np.float32)
    return PromptFeatures(np.full(len(LEXICAL_NAMES), number, np.float32), words / np.linalg.norm(words))


def filled(count: int, capacity: int = 4096) -> History:
    """A history of ``count`` prompts of two models, with different lengths."""
    history = History(capacity)
    for number in range(count):
        history.add(number, features(number), "ab"[number % 2], 1 + number / 10)
    return history


def held(history: History) -> list[int]:
    """Prompts in the ring, oldest first."""
    state = history.dump()[2]
    prompts, first = [prompt_hash for prompt_hash, _, _ in state["outputs"]], state["next_row"]
    return prompts[first:] + prompts[:first]


def through_json(history: History) -> tuple[Any, Any, dict[str, Any]]:
    words, lexical, state = history.dump()
    return words, lexical, json.loads(json.dumps(state))


@given(st.lists(st.floats(0, 14), min_size=1, max_size=40))
def test_stats_of_up_to_500_outputs_are_their_mean_and_variance(lengths: list[float]) -> None:
    stats = LengthStats()
    for length in lengths:
        stats.add(length)
    assert stats.count == len(lengths)
    assert stats.mean == pytest.approx(np.mean(lengths), abs=1e-9)
    assert stats.variance == pytest.approx(np.var(lengths), abs=1e-6)


def test_stats_of_many_outputs_follow_the_latest_ones() -> None:
    stats = LengthStats()
    for length in [2.0] * 3000 + [5.0] * 3000:
        stats.add(length)
    assert stats.mean == pytest.approx(5, abs=0.05)


def test_a_new_model_has_the_stats_of_the_prior_and_an_old_one_its_own() -> None:
    prior = LengthStats(1000, mean=4.0, variance=0.25)
    assert LengthStats().shrunk_towards(prior) == (4.0, 0.5)
    mean, deviation = LengthStats(4, mean=2.0, variance=0.75).shrunk_towards(prior)
    assert mean == pytest.approx(3.0) and deviation == pytest.approx(math.sqrt(0.5))
    assert LengthStats(10_000, mean=2.0, variance=1.0).shrunk_towards(prior)[0] == pytest.approx(2.0, abs=1e-3)


def test_the_deviation_of_equal_lengths_is_not_zero() -> None:
    assert LengthStats(9, 3.0, 0.0).shrunk_towards(LengthStats())[1] == 0.05


@pytest.mark.parametrize(
    "values", [(1, 2), (1, 2, 3, 4), (1, math.nan, 1), (math.inf, 1, 1), (1, 1, -0.1), (-1, 1, 1), "abc", (None, 1, 1)]
)
def test_values_that_are_no_stats_are_rejected(values: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        LengthStats.from_fields(values)


def test_an_empty_history_has_no_neighbours_and_no_examples() -> None:
    history = History(8)
    assert history.neighbours(features(1)) is None
    assert len(history) == len(history.examples(5)) == 0


def test_neighbours_of_a_known_prompt_are_its_outputs() -> None:
    history = filled(40)
    for length in (2.0, 4.0):
        history.add(99, features(99), "a", length)
    found = history.neighbours(features(99))
    mean, deviation = history.scale("a")
    assert found is not None and found.num_outputs == pytest.approx(2, rel=1e-4)
    assert found.mean == pytest.approx((3.0 - mean) / deviation, abs=1e-5)
    assert history.neighbours(features(100)) is None


def test_outputs_of_models_with_different_lengths_are_compared_after_standardisation() -> None:
    history = History()
    for number in range(200):
        history.add(number, features(number), "short", 2.0 + number % 2)
        history.add(number, features(number), "long", 6.0 + number % 2)
    even, odd = history.neighbours(features(10)), history.neighbours(features(11))
    assert even is not None and odd is not None
    assert even.mean == pytest.approx(-1, abs=0.2) and odd.mean == pytest.approx(1, abs=0.2)


def test_at_most_16_neighbours_count() -> None:
    history, one = History(), features(1)
    for number in range(30):
        history.add(number, one, "m", 3.0)
    found = history.neighbours(one)
    assert found is not None and found.num_outputs == pytest.approx(16, rel=1e-3)


def test_neighbours_are_those_that_a_comparison_with_every_prompt_finds() -> None:
    history, rng = History(), random.Random(4)
    words = ["".join(rng.choices(string.ascii_lowercase, k=4)) for _ in range(18)]
    texts = [" ".join(rng.choices(words[: rng.randint(2, 18)], k=rng.randint(1, 7))) for _ in range(600)]
    known = {text: EXTRACTOR.extract(text) for text in texts[:500]}
    for index, (text, of_text) in enumerate(known.items()):
        history.add(index, of_text, "m", math.log(1 + len(text)))
    mean, deviation = history.scale("m")
    num_found = 0
    for text in texts:
        asked = EXTRACTOR.extract(text)
        similarity = {other: (float(one.words @ asked.words) - 0.9) / 0.1 for other, one in known.items()}
        similar = [other for other in similarity if similarity[other] > 1e-4]
        found = history.neighbours(asked)
        assert (found is None) is (not similar)
        if found is not None and len(similar) <= 16:  # of more it takes the nearest, and some are equally near
            weight = sum(similarity[other] ** 2 for other in similar)
            total = sum(similarity[other] ** 2 * (math.log(1 + len(other)) - mean) / deviation for other in similar)
            assert found.num_outputs == pytest.approx(weight, rel=1e-3)
            assert found.mean == pytest.approx(total / weight, abs=1e-3)
            num_found += 1
    assert num_found > 100


def test_a_repeated_prompt_keeps_its_row_and_its_latest_32_outputs() -> None:
    history = History(8)
    for index in range(40):
        history.add(5, features(5), "m", float(index))
    assert len(history) == history.num_rows == 1 and history.num_observed == 40
    ((_, _, lengths),) = history.dump()[2]["outputs"]
    assert lengths == [("m", float(index)) for index in range(8, 40)]


def test_a_full_ring_evicts_its_oldest_prompt() -> None:
    history = filled(9, capacity=8)
    assert held(history) == list(range(1, 9))
    assert history.neighbours(features(0)) is None and history.neighbours(features(8)) is not None
    history.add(0, features(0), "a", 1.0)
    assert held(history) == [*range(2, 9), 0] and history.num_rows == 10


@given(st.integers(1, 5), st.lists(st.integers(0, 9), max_size=40))
def test_the_ring_holds_the_prompts_that_got_a_row_last(capacity: int, prompts: list[int]) -> None:
    history, expected = History(capacity), OrderedDict[int, int]()
    for prompt in prompts:
        history.add(prompt, features(prompt), "m", 3.0)
        expected[prompt] = expected.get(prompt, 0) + 1
        if len(expected) > capacity:
            expected.popitem(last=False)
    assert held(history) == list(expected)
    assert list(history.examples(99).num_outputs) == list(expected.values())
    assert all(history.neighbours(features(prompt)) is not None for prompt in expected)


def test_examples_are_the_latest_rows_oldest_first_with_their_mean_standardised_length() -> None:
    history = filled(20, capacity=8)
    history.add(19, features(19), "a", 9.0)
    examples = history.examples(3)
    assert [int(row[0]) for row in examples.lexical] == [17, 18, 19]
    assert examples.words[2] == pytest.approx(features(19).words)
    assert list(examples.num_outputs) == [1, 1, 2]
    standard = [
        (2.9 - history.scale("b")[0]) / history.scale("b")[1],
        (9 - history.scale("a")[0]) / history.scale("a")[1],
    ]
    assert examples.targets[2] == pytest.approx(np.mean(standard), abs=1e-5)


def test_a_dump_does_not_change_when_outputs_are_added() -> None:
    history = filled(4)
    words, _, state = history.dump()
    history.add(3, features(3), "a", 9.0)
    assert state["outputs"][3] == [3, 0, [("b", 1.3)]] and state["num_observed"] == 4
    assert words[3] == pytest.approx(features(3).words)


@pytest.mark.parametrize("count", [0, 5, 8, 13])
def test_a_loaded_history_continues_as_the_dumped_one(count: int) -> None:
    saved, loaded = filled(count, capacity=8), History(8)
    loaded.load(*through_json(saved))
    for history in (saved, loaded):
        history.add(77, features(77), "a", 2.5)
    assert held(loaded) == held(saved) and loaded.num_observed == saved.num_observed
    assert loaded.scale("a") == saved.scale("a") and loaded.scale("new") == saved.scale("new")
    for number in range(count):
        assert loaded.neighbours(features(number)) == saved.neighbours(features(number))


def test_a_smaller_history_loads_the_latest_rows() -> None:
    small = History(3)
    small.load(*through_json(filled(8)))
    assert held(small) == [5, 6, 7] and small.num_rows == 8 and small.num_observed == 8
    small.add(50, features(50), "a", 1.0)
    assert held(small) == [6, 7, 50]


def test_a_larger_history_loads_a_full_ring_oldest_first() -> None:
    large = History(20)
    large.load(*through_json(filled(11, capacity=8)))
    large.add(50, features(50), "a", 1.0)
    assert held(large) == [*range(3, 11), 50]


def test_prompts_of_other_tenants_are_no_neighbours() -> None:
    history = History()
    for tenant_id, length in ((0, 1.0), (1, 2.0), (2**64 - 1, 3.0)):
        history.add(tenant_id, features(7), "m", length, tenant_id)
    for loaded in (history, History()):
        if loaded is not history:
            loaded.load(*through_json(history))
        means = [one.mean for tenant_id in (0, 1, 2**64 - 1) if (one := loaded.neighbours(features(7), tenant_id))]
        assert means == sorted(set(means)) and len(means) == 3
        assert loaded.neighbours(features(7), 5) is None


BAD_STATES: dict[str, dict[str, Any]] = {
    "fewer outputs than rows": {"outputs": []},
    "a prompt twice": {"outputs": [[0, 0, [["a", 1.0]]], [0, 0, [["a", 1.0]]]]},
    "a prompt without outputs": {"outputs": [[0, 0, []], [1, 0, [["b", 1.0]]]]},
    "a model without statistics": {"outputs": [[0, 0, [["c", 1.0]]], [1, 0, [["b", 1.0]]]]},
    "an infinite length": {"outputs": [[0, 0, [["a", math.inf]]], [1, 0, [["b", 1.0]]]]},
    "a length that is no number": {"outputs": [[0, 0, [["a", "long"]]], [1, 0, [["b", 1.0]]]]},
    "no statistics of all models": {"all_models": None},
    "negative variance": {"stats": {"a": [1, 1.0, -1.0], "b": [1, 1.0, 0.0]}},
    "no number of outputs": {"num_observed": None},
    "no next row": {"next_row": None},
    "a next row past the end": {"next_row": 3},
    "fewer rows than there are": {"num_rows": 1},
    "a tenant that is no number": {"outputs": [[0, "a", [["a", 1.0]]], [1, 0, [["b", 1.0]]]]},
}


@pytest.mark.parametrize("change", BAD_STATES.values(), ids=BAD_STATES.keys())
def test_a_state_that_is_not_a_dumped_one_is_rejected_and_changes_nothing(change: dict[str, Any]) -> None:
    words, lexical, state = through_json(filled(2))
    history = filled(4)
    before = history.dump()[2]
    with pytest.raises((ValueError, TypeError, KeyError)):
        history.load(words, lexical, state | change)
    assert history.dump()[2] == before and history.neighbours(features(3)) is not None


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("damage", ["shape", "rows", "nan"])
def test_rows_that_do_not_belong_to_the_outputs_are_rejected(which: int, damage: str) -> None:
    *arrays, state = filled(4).dump()
    if damage == "nan":
        arrays[which][1, 1] = np.nan
    else:
        arrays[which] = arrays[which][:, :-1] if damage == "shape" else arrays[which][:-1]
    with pytest.raises(ValueError, match="belong together"):
        History().load(arrays[0], arrays[1], state)
