import numpy as np
import pytest

from muxmesh.predictor.prompt_features import NAMES, READ_CHARS, WORD_DIM, Reader

READER = Reader()


def feature(text: str, name: str) -> float:
    return float(READER.read(text).lexical[NAMES.index(name)])


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n\n", "?", "naïve café 東京", "x" * 50_000, "1" * 5000, "²³", "a" * 10 + "\ud800", "🙂" * 100, "\x00"],
)
def test_any_text_gives_finite_vectors(text: str) -> None:
    reading = READER.read(text)
    assert reading.lexical.shape == (len(NAMES),) and reading.words.shape == (WORD_DIM,)
    assert np.isfinite(reading.lexical).all() and np.isfinite(reading.words).all()
    assert np.linalg.norm(reading.words) == pytest.approx(1, abs=1e-3) or not reading.words.any()


def test_prompts_that_share_words_are_alike() -> None:
    one = READER.read("Summarize the following article about solar energy in Europe").words
    like = READER.read("Please summarize this article about solar energy in Asia").words
    other = READER.read("def quicksort(items): return sorted(items)").words
    assert one @ like > 0.5 > 0.2 > one @ other


def test_two_readers_agree() -> None:
    text = "Write three sentences about the sea."
    assert (Reader().read(text).words == READER.read(text).words).all()


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Write a story in 100 words.", 140),
        ("Give me three short paragraphs on bees", 330),
        ("Name 5 tips", 150),
        ("a list of names", 0),
        ("in 2024 we met", 0),
        ("99999999999999 words", 20_000),
    ],
)
def test_an_amount_that_is_asked_for_is_seen(text: str, tokens: float) -> None:
    assert np.expm1(feature(text, "amount_tokens")) == pytest.approx(tokens, rel=1e-3)


def test_cues_and_shape_are_counted() -> None:
    assert feature("Explain, describe and compare", "explain_cues") == pytest.approx(np.log1p(3))
    assert feature("What is this?", "ends_asking") == 1
    assert feature("What is this.", "ends_asking") == 0
    assert feature("x" * 9000, "chars") == pytest.approx(np.log1p(9000))


def test_of_a_long_prompt_beginning_and_end_are_read() -> None:
    filler = "lorem " * READ_CHARS
    assert feature(f"Translate this: {filler}", "edit_cues") == feature(f"{filler} translate this", "edit_cues") > 0
    assert feature(f"{filler} translate {filler}", "edit_cues") == 0
