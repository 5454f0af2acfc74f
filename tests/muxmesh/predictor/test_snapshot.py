import contextlib
import functools
import io
import itertools
import math
import operator
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxmesh.errors import ConfigError
from muxmesh.predictor import snapshot
from muxmesh.predictor.checked_predictor import CheckedPrediction, CheckedPredictor
from muxmesh.predictor.length_predictor import LengthPredictor, fit_now
from tests.support.predictors import prompts_with_lengths, trained_predictor


def observed(predictor: LengthPredictor, count: int, seed: int = 11) -> CheckedPredictor:
    """Checks on ``predictor`` that have seen ``count`` outputs with hints."""
    checked = CheckedPredictor(predictor)
    for prompt, length in prompts_with_lengths(count, seed):
        checked.observe(checked.predict(prompt, "m", "tenant", 50), length, False)
    return checked


@functools.cache
def small() -> bytes:
    predictor = LengthPredictor()
    checked = observed(predictor, 5)
    return snapshot.write(snapshot.take(predictor, checked))


def restored(predictor: LengthPredictor, checked: CheckedPredictor) -> tuple[LengthPredictor, CheckedPredictor]:
    return snapshot.read(snapshot.write(snapshot.take(predictor, checked)))


PROMPTS = [
    *(prompt for prompt, _ in prompts_with_lengths(60, seed=3)),
    *("list of words", "words of list", "the list of the words"),  # equal vectors
    *("", "x", "Recite a saga."),
]
OUTPUTS = st.tuples(
    st.integers(0, len(PROMPTS) - 1),
    st.sampled_from(["m", "n"]),
    st.sampled_from(["", "a", "b"]),
    st.one_of(st.none(), st.integers(1, 400)),
    st.integers(1, 5000),
    st.booleans(),
)
Output = tuple[int, str, str, int | None, int, bool]


def learn(checked: CheckedPredictor, outputs: list[Output]) -> list[CheckedPrediction]:
    """Observes outputs, with the fits that are due; returns their predictions."""
    found = []
    for index, model, tenant, hint_tokens, num_tokens, is_short in outputs:
        found.append(checked.predict(PROMPTS[index], model, tenant, hint_tokens))
        checked.observe(found[-1], num_tokens, censored=is_short and num_tokens % 3 == 0)
        fit_now(checked)
    return found


def shown(found: list[CheckedPrediction]) -> list[tuple[float, float, str]]:
    return [(one.prediction.p50_tokens, one.prediction.p90_tokens, one.source) for one in found]


def every_prediction(checked: CheckedPredictor) -> list[tuple[float, float, str]]:
    return shown(
        [
            checked.predict(PROMPTS[index], model, tenant, hint_tokens)
            for index in range(0, len(PROMPTS), 3)
            for model, tenant, hint_tokens in itertools.product(("m", "new"), ("", "a"), (None, 70))
        ]
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(OUTPUTS, max_size=12), st.integers(0, 90), st.integers(0, 2**32), st.lists(OUTPUTS, max_size=4))
def test_a_restored_predictor_predicts_exactly_what_the_saved_one_does_now_and_later(
    before: list[Output], num_more: int, seed: int, after: list[Output]
) -> None:
    rng = random.Random(seed)
    more: list[Output] = [
        (rng.randrange(len(PROMPTS)), rng.choice("mn"), rng.choice(["", "a"]), None, rng.randint(1, 900), False)
        for _ in range(num_more)
    ]
    predictor = LengthPredictor(capacity=48)
    checked = CheckedPredictor(predictor)
    learn(checked, before + more)
    other, other_checked = snapshot.read(snapshot.write(snapshot.take(predictor, checked)), capacity=48)
    assert every_prediction(other_checked) == every_prediction(checked)
    later = (after + more)[:40]
    assert shown(learn(other_checked, later)) == shown(learn(checked, later))
    assert every_prediction(other_checked) == every_prediction(checked)
    assert (other.num_published, other.num_rejected) == (predictor.num_published, predictor.num_rejected)


def test_few_outputs_give_no_bound_of_few_scores_after_a_restart() -> None:
    predictor = LengthPredictor()
    checked = CheckedPredictor(predictor)
    for prompt, num_tokens in (("Say hi", 8), ("Explain rivers", 150)):
        checked.observe(checked.predict(prompt, "m"), num_tokens, False)
    running = checked.predict("Something else", "m")
    _, other = restored(predictor, checked)
    found = other.predict("Something else", "m")
    assert found.prediction == running.prediction and found.source == running.source == "median"
    assert found.prediction.p50_tokens == pytest.approx(math.sqrt(8 * 150))


def test_a_restored_predictor_continues_with_the_fit_of_the_saved_one() -> None:
    predictor = trained_predictor()
    other, _ = restored(predictor, observed(predictor, 100))
    assert (other.num_published, other.num_rejected) == (predictor.num_published, predictor.num_rejected)
    assert predictor.fit is not None and other.fit is not None
    for name, array in predictor.fit.arrays().items():
        assert np.array_equal(other.fit.arrays()[name], array), name


def test_a_snapshot_of_a_predictor_without_outputs_restores_a_cold_one() -> None:
    predictor = LengthPredictor()
    other, checked = snapshot.read(snapshot.write(snapshot.take(predictor, CheckedPredictor(predictor))))
    assert checked.predict("Hello", "m").source == "cold" and other.num_published == 0


def test_a_snapshot_does_not_change_when_the_predictor_learns() -> None:
    predictor = LengthPredictor()
    checked = observed(predictor, 40)
    taken = snapshot.take(predictor, checked)
    before = snapshot.write(taken)
    for prompt, length in prompts_with_lengths(40, seed=11):  # the same prompts: their rows change
        checked.observe(checked.predict(prompt, "m", "tenant", 50), 10 * length, False)
    restored, _ = snapshot.read(snapshot.write(taken))
    assert restored.history.dump()[2] == snapshot.read(before)[0].history.dump()[2]


def test_a_snapshot_takes_about_1000_bytes_for_each_prompt() -> None:
    predictor = LengthPredictor()
    for number in range(1000):
        predictor.observe(predictor.predict(f"{number} {number * 7}", "m"), "m", 50, False)
    assert len(snapshot.write(snapshot.take(predictor, CheckedPredictor(predictor)))) < 1050 * 1000


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\x03\x04", b"\x93NUMPY"], ids=["empty", "text", "zip", "array"])
def test_data_that_is_no_snapshot_is_rejected(data: bytes) -> None:
    with pytest.raises(ConfigError, match="snapshot is damaged"):
        snapshot.read(data)


def test_a_truncated_snapshot_is_rejected() -> None:
    with pytest.raises(ConfigError, match="snapshot is damaged"):
        snapshot.read(small()[: len(small()) // 2])


@pytest.mark.parametrize("missing", ["words", "lexical", "state"])
def test_a_snapshot_without_one_of_its_arrays_is_rejected(missing: str) -> None:
    arrays = dict(np.load(io.BytesIO(small())))
    del arrays[missing]
    out = io.BytesIO()
    np.savez(out, **arrays)
    with pytest.raises(ConfigError, match=f"damaged.*{missing}"):
        snapshot.read(out.getvalue())


@pytest.mark.parametrize("flag", [1, 32, 64], ids=["encrypted", "patched", "strong encryption"])
def test_a_zip_file_with_an_unsupported_feature_is_rejected(flag: int) -> None:
    data = bytearray(small())
    with zipfile.ZipFile(io.BytesIO(small())) as archive:
        data[archive.start_dir + 8] |= flag  # of the first entry of the central directory
        data[archive.infolist()[0].header_offset + 6] |= flag
    with pytest.raises(ConfigError, match="snapshot is damaged"):
        snapshot.read(bytes(data))


def test_an_array_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (tmp_path / "touched",)

    out = io.BytesIO()
    np.savez(out, words=np.array([Touch()], object), lexical=np.zeros(1), state=np.zeros(1))
    with pytest.raises(ConfigError, match="snapshot is damaged"):
        snapshot.read(out.getvalue())
    assert not (tmp_path / "touched").exists()


@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_harmless_or_rejected(changes: list[tuple[int, int]]) -> None:
    data = bytearray(small())
    for offset, value in changes:
        data[-1 - offset % len(data)] = value
    with contextlib.suppress(ConfigError):
        _, checked = snapshot.read(bytes(data))
        assert checked.predict("Hello", "m").prediction.p50_tokens > 0


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "0/1/2", "format 0/1/2, this version reads 3/"),
        ("checked", [], "damaged"),
        ("history/num_observed", None, "damaged"),
        ("history/num_observed", math.inf, "damaged"),
        ("history/all_models", [math.inf, 1, 1], r"damaged: length statistics are .*, not \[inf, 1, 1\]"),
        ("history/all_models", [{}, 1, 1], "damaged"),
        ("history/outputs", [], "do not belong together"),
        ("predictor/conformal", {}, "damaged"),
        ("predictor/conformal/bound", 9.0, "damaged: a bound needs 8 scores, not 5"),
        ("predictor/median_shifts/m/scores", ["x"], "damaged"),
        ("predictor/published_rows", None, "damaged"),
        ("history/next_row", 7, "damaged: row 7 of 5 is the next one"),
        ("checked/models/m/failed_tokens", -1, "damaged: -1 is not positive"),
        ("checked/models/m/constant_tokens", "40", "damaged"),
        ("checked/models/m/constant_tokens", math.nan, "damaged: nan is not finite"),
        ("checked/models/m/constant_tokens", 0, "damaged: 0 is not positive"),
        ("checked/models/m/stats", [1, 1], "damaged"),
        ("checked/models/m/stats", [1, 1, -1], "damaged: length statistics are"),
        ("checked/models/m/predicted", ["1"], "damaged"),
        ("checked/hint_errors", {"tenant": 3}, "damaged"),
    ],
)
def test_a_snapshot_with_another_value_is_rejected_with_the_reason(path: str, value: object, message: str) -> None:
    predictor = LengthPredictor()
    taken = snapshot.take(predictor, observed(predictor, 5))
    *folders, name = path.split("/")
    into = functools.reduce(operator.getitem, folders, taken.state)
    assert name in into
    into[name] = value
    with pytest.raises(ConfigError, match=message):
        snapshot.read(snapshot.write(taken))


@pytest.mark.parametrize(
    "name", ["mean", "scale", "directions", "rows", "squares", "weights", "tenant_ids", "mean_spread"]
)
@pytest.mark.parametrize("damage", ["missing", "shape", "nan"])
def test_a_damaged_fit_is_rejected(name: str, damage: str) -> None:
    predictor = trained_predictor(40)
    arrays = dict(np.load(io.BytesIO(snapshot.write(snapshot.take(predictor, CheckedPredictor(predictor))))))
    array = arrays.pop(f"fit_{name}")
    if damage != "missing":
        arrays[f"fit_{name}"] = np.append(array, 0) if damage == "shape" else np.full(array.shape, np.nan)
    out = io.BytesIO()
    np.savez(out, **arrays)
    with pytest.raises(ConfigError, match="damaged"):
        snapshot.read(out.getvalue())
