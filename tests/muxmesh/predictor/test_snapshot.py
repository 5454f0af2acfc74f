import contextlib
import functools
import io
import math
import operator
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.errors import ConfigError
from muxmesh.predictor import snapshot
from muxmesh.predictor.checked_predictor import CheckedPredictor
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


def test_a_restored_predictor_continues_as_the_saved_one() -> None:
    predictor = trained_predictor()
    checked = observed(predictor, 100)
    other, other_checked = snapshot.read(snapshot.write(snapshot.take(predictor, checked)))
    assert other.history.num_observed == predictor.history.num_observed
    assert other_checked.dump() == checked.dump() and other.scores() == predictor.scores()
    fit_now(predictor)  # as restoring does
    for prompt, _ in prompts_with_lengths(20, seed=12):
        mine, theirs = predictor.predict(prompt, "m"), other.predict(prompt, "m")
        assert theirs.source == mine.source
        assert math.log(theirs.p50_tokens / mine.p50_tokens) == pytest.approx(0, abs=0.4)


def test_a_restored_predictor_is_fitted_and_has_published_nothing_else() -> None:
    predictor = trained_predictor(60)
    other, _ = snapshot.read(snapshot.write(snapshot.take(predictor, CheckedPredictor(predictor))))
    assert (other.num_published, other.num_rejected) == (1, 0)
    assert other.predict("Write a long story of trains.", "m").source in {"regressed", "retrieved"}


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


def test_a_snapshot_takes_about_700_bytes_for_each_prompt() -> None:
    predictor = LengthPredictor()
    for number in range(1000):
        predictor.observe(predictor.predict(f"{number} {number * 7}", "m"), "m", 50, False)
    assert len(snapshot.write(snapshot.take(predictor, CheckedPredictor(predictor)))) < 750 * 1000


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
        ("format", "0/1/2", "format 0/1/2, this version reads 2/"),
        ("checked", [], "damaged"),
        ("history/num_observed", None, "damaged"),
        ("history/num_observed", math.inf, "damaged"),
        ("history/all_models", [math.inf, 1, 1], r"damaged: length statistics are .*, not \[inf, 1, 1\]"),
        ("history/all_models", [{}, 1, 1], "damaged"),
        ("history/outputs", [], "do not belong together"),
        ("scores", {"": ["x"]}, "damaged"),
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
