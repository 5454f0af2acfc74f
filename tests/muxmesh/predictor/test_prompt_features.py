import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.predictor.prompt_features import (
    CUES,
    EXCERPT_CHARS,
    LEXICAL_NAMES,
    WORD_DIM,
    FeatureExtractor,
    PromptFeatures,
    excerpt,
)

EXTRACTOR = FeatureExtractor()


def feature(text: str, name: str) -> float:
    return float(EXTRACTOR.extract(text).lexical[LEXICAL_NAMES.index(name)])


def cosine(left: str, right: str) -> float:
    return float(EXTRACTOR.extract(left).words @ EXTRACTOR.extract(right).words)


def check_is_finite(features: PromptFeatures) -> None:
    assert features.lexical.shape == (len(LEXICAL_NAMES),) and features.words.shape == (WORD_DIM,)
    assert features.lexical.dtype == features.words.dtype == np.float32
    assert np.isfinite(features.lexical).all() and np.isfinite(features.words).all()
    assert np.linalg.norm(features.words) == pytest.approx(1, abs=1e-3) or not features.words.any()


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n\n", "?", "naïve café 東京", "x" * 50_000, "1" * 5000, "²³", "a" * 10 + "\ud800", "🙂" * 100, "\x00"],
)
def test_unusual_texts_have_finite_features(text: str) -> None:
    check_is_finite(EXTRACTOR.extract(text))


@given(st.text(max_size=300))
def test_every_text_has_finite_features(text: str) -> None:
    check_is_finite(EXTRACTOR.extract(text))


def test_prompts_that_share_words_have_similar_word_vectors() -> None:
    text = "Summarize the following article about solar energy in Europe"
    assert cosine(text, "Please summarize this article about solar energy in Asia") > 0.5
    assert cosine(text, "def quicksort(items): return sorted(items)") < 0.2


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("solar energy in Europe", "Europe in ENERGY solar"),
        ("the history of art", "history art"),
        ("summarize", "summarized"),
        ("the of to", ""),
    ],
    ids=["order and case", "stop words", "endings", "only stop words"],
)
def test_word_vectors_ignore_what_does_not_change_the_topic(left: str, right: str) -> None:
    assert EXTRACTOR.extract(left).words == pytest.approx(EXTRACTOR.extract(right).words, abs=1e-6)


def test_a_repeated_word_weighs_more_by_the_logarithm() -> None:
    apple, river = EXTRACTOR.extract("apple").words, EXTRACTOR.extract("river").words
    expected = (1 + math.log(3)) * apple + river
    assert EXTRACTOR.extract("apple river apple apple").words == pytest.approx(
        expected / np.linalg.norm(expected), abs=1e-5
    )


def test_word_vectors_are_the_same_in_every_process_and_version() -> None:
    """Stored snapshots hold them."""
    vector = FeatureExtractor().extract("Write three sentences about the sea.").words
    assert vector[:6] / 0.0543125 == pytest.approx([1, 1, -1, -1, 1, 0], abs=1e-4)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Write a story in 100 words.", 140),
        ("Give me three short paragraphs on bees", 330),
        ("Name 5 tips", 150),
        ("a short paragraph", 110),
        ("twenty lines", 240),
        ("two pages, or 5 tips", 1000),
        ("5 tips, or two pages", 1000),
        ("a list of names", 0),
        ("three of the very best tips", 0),
        ("words, 100 of them", 0),
        ("in 2024 we met", 0),
        ("99999999999999 words", 20_000),
    ],
)
def test_a_requested_amount_is_converted_to_tokens(text: str, tokens: float) -> None:
    assert np.expm1(feature(text, "amount_tokens")) == pytest.approx(tokens, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("chars", "x" * 9000, math.log1p(9000)),
        ("lines", "a\nb\nc", math.log1p(2)),
        ("words", "one two 3 four", math.log1p(3)),
        ("word_chars", "ab abcd 12345", 3),
        ("numbers", "7 and 12", math.log1p(2)),
        ("digits", "ab12", 0.5),
        ("capitals", "ABcd", 0.5),
        ("non_ascii", "aé", 0.5),
        ("periods", "One. Two! Three", math.log1p(2)),
        ("questions", "?????", 3),
        ("colons", "a: b:", 2),
        ("quotes", "'a' \"b\" 'c'", 4),
        ("commas", "a, b", math.log1p(1)),
        ("brackets", "f(x) = [1];", math.log1p(6)),
        ("ends_with_question", "What is this? \n", 1),
        ("ends_with_question", "What is this.", 0),
        ("first_line_words", "\nSum up this:\nfoo bar", math.log1p(3)),
        ("later_line_words", "Sum up this:\nfoo bar\nbaz", math.log1p(3)),
        ("quoted_words", 'Translate "good morning to you" please', math.log1p(4)),
        ("quoted_words", "Translate “good morning” please", math.log1p(2)),
        ("first_cue", "please translate, then explain", CUES.index("edit")),
        ("first_cue", "hello there", -1),
        ("explain_cues", "Explain, describe and compare", math.log1p(3)),
        ("edit_cues", "Explain, describe and compare", 0),
    ],
)
def test_a_lexical_feature_has_its_value(name: str, text: str, value: float) -> None:
    assert feature(text, name) == pytest.approx(value, rel=1e-5)


def test_a_word_with_two_cues_counts_for_the_first() -> None:
    assert feature("list", "list_cues") > 0 == feature("list", "snippet_cues")


@pytest.mark.parametrize("length", [0, EXCERPT_CHARS - 1, EXCERPT_CHARS])
def test_a_short_text_is_its_own_excerpt(length: int) -> None:
    assert excerpt("x" * length) == "x" * length


def test_the_excerpt_of_a_long_text_is_its_start_and_its_end() -> None:
    half = EXCERPT_CHARS // 2
    assert excerpt("a" * half + "b" * 7 + "c" * half) == "a" * half + "\n" + "c" * half


def test_features_of_a_long_prompt_are_those_of_its_start_and_end() -> None:
    filler = "lorem " * EXCERPT_CHARS
    assert feature(f"Translate this: {filler}", "edit_cues") == feature(f"{filler} translate this", "edit_cues") > 0
    assert feature(f"{filler} translate {filler}", "edit_cues") == 0
