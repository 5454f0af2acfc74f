"""Features of a prompt that correlate with the length of its output. Pure: text in, two small vectors out.

The lexical features separate tasks: cue words, requested amounts, and the shape of the text. They are made for English
and source code; for other languages only the counts are informative, beside the word vector. Similar prompts share
words, so the word vector is a bag of word stems, each hashed to a fixed row of random signs (feature hashing,
Weinberger et al. 2009). It needs no download, no vocabulary and no model.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from string import ascii_uppercase, digits

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]

WORD_DIM = 192
EXCERPT_CHARS = 2000
"""Of a longer prompt, half of this is read at its start and half at its end, since instructions are there."""

_TOKEN = re.compile(r"[a-z]+|[0-9]+|[^\sa-z0-9]")
_WORDS_START, _WORDS_END = "a", "{"
"""Tokens that are words are those in this half-open interval."""
_CAPITALS, _DIGITS = ascii_uppercase.encode(), frozenset(digits)
_QUOTED = re.compile("[\"'\u201c\u2018]([^\"'\u201c\u201d\u2018\u2019\n]{3,400})[\"'\u201d\u2019]")
_STEM_CHARS = 6
_ROWS = 8192
_SEED = 7
_STOP_WORDS = frozenset({
    "the", "a", "an", "of", "to", "in", "and", "is", "for", "on", "with", "that", "this", "it", "as", "by", "from",
    "be", "or", "are", "at",
})  # fmt: skip

_CUE_WORDS = {
    "compose": "write compose draft story essay poem article blog letter email speech script song post report plot",
    "explain": "explain describe discuss elaborate analyze analyse compare contrast why overview difference tell about",
    "list": "list example examples ideas tips steps ways reasons recommend recommendation recommendations suggest top "
    "outline recipe itinerary plan suggestions",
    "classify": "classify identify which choose select category categorize label true false yes no detect determine",
    "edit": "edit rewrite rephrase paraphrase correct translate convert change replace fix transform grammar spelling",
    "condense": "summarize summarise summary extract find simplify condense headline title name",
    "calculate": "calculate compute solve many much total percent percentage average sum equation per each twice half",
    "program": "code function program python java javascript algorithm class script method application game",
    "snippet": "sql mysql query html css tag element loop statement regex array list variable expression line command",
    "one_word": "synonym antonym symbol capital author year date color colour value output number noun verb adjective "
    "word term name opposite",
    "create": "create generate design develop build make construct implement invent produce",
    "question": "what who when where how is are does do can did was will",
    "short": "brief briefly short concise concisely single only quick quickly just simply",
    "long": "detail detailed details long depth thorough thoroughly comprehensive complete full extensive step",
    "chat": "conversation dialogue role act pretend imagine you chat",
    "context": "given following below above passage text sentence paragraph input provided",
}
CUES = tuple(_CUE_WORDS)
_CUE_OF = {word: index for index, words in reversed(list(enumerate(_CUE_WORDS.values()))) for word in words.split()}
"""Word → index of the first cue that it belongs to."""

_NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
            "nine": 9, "ten": 10, "twenty": 20, "hundred": 100}  # fmt: skip
_TOKENS_PER_UNIT = {"word": 1.4, "sentence": 25, "paragraph": 110, "page": 500, "line": 12, "name": 6, "tweet": 40,
                    "item": 20, "example": 30, "idea": 30, "tip": 30, "step": 30, "way": 30, "reason": 35, "fact": 25,
                    "question": 20, "point": 25}  # fmt: skip
_UNITS = frozenset(_TOKENS_PER_UNIT) | {f"{unit}s" for unit in _TOKENS_PER_UNIT}
_MAX_TOKENS_TO_UNIT = 3
"""A number counts if its unit is at most this many tokens after it."""
_MAX_AMOUNT_TOKENS = 20_000.0

LEXICAL_NAMES = (
    "chars",
    "lines",
    "words",
    "word_chars",
    "numbers",
    "digits",
    "capitals",
    "non_ascii",
    "periods",
    "questions",
    "colons",
    "quotes",
    "commas",
    "brackets",
    "ends_with_question",
    "later_line_words",
    "quoted_words",
    "first_line_words",
    "amount_tokens",
    "first_cue",
    *(f"{cue}_cues" for cue in CUES),
)
"""Names of the lexical features, in the order of the vector."""


@dataclass(frozen=True, slots=True, eq=False)
class PromptFeatures:
    """Features of one prompt: ``lexical`` float32 [len(LEXICAL_NAMES)], ``words`` float32 [WORD_DIM] of norm 1 or 0."""

    lexical: Vector
    words: Vector


class FeatureExtractor:
    """Owns the rows that stems are hashed to. They are the same in every process and every version."""

    def __init__(self) -> None:
        raw = np.random.PCG64(_SEED).random_raw(_ROWS * WORD_DIM // 64)  # numpy guarantees the stream of raw bits
        self._signs = np.unpackbits(raw.view(np.uint8)).reshape(_ROWS, WORD_DIM).astype(np.int8) * 2 - 1

    def extract(self, text: str) -> PromptFeatures:
        """The features of a prompt. All but its length are those of its `excerpt`."""
        part = excerpt(text)
        tokens = _TOKEN.findall(part.lower())
        words = [token for token in tokens if _WORDS_START <= token < _WORDS_END]
        others = [token for token in tokens if not _WORDS_START <= token < _WORDS_END]
        return PromptFeatures(_lexical(text, part, tokens, words, others), self._words(words, others))

    def _words(self, words: list[str], others: list[str]) -> Vector:
        stems = Counter([word[:_STEM_CHARS] for word in words if word not in _STOP_WORDS])
        stems.update(others)
        if not stems:
            return np.zeros(WORD_DIM, np.float32)
        rows = [zlib.crc32(stem.encode("utf-8", "replace")) % _ROWS for stem in stems]
        weights = 1 + np.log(np.fromiter(stems.values(), np.float32, len(stems)))
        vector: Vector = weights @ self._signs[rows].astype(np.float32)
        return vector / np.float32(max(math.sqrt(vector @ vector), 1e-6))


def excerpt(text: str) -> str:
    """The part of a prompt from which features are extracted."""
    if len(text) <= EXCERPT_CHARS:
        return text
    half = EXCERPT_CHARS // 2
    return f"{text[:half]}\n{text[-half:]}"


def _lexical(text: str, part: str, tokens: list[str], words: list[str], others: list[str]) -> Vector:
    numbers = [token for token in others if token[0].isdigit()]
    length = max(1, len(part))
    cues = [_CUE_OF[word] for word in words if word in _CUE_OF]
    first_cue = cues[0] if cues else -1
    first_line, _, later_lines = part.strip().partition("\n")  # often the instruction, and the text it applies to
    plain = part.encode("ascii", "ignore")
    capitals = len(plain) - len(plain.translate(None, _CAPITALS))
    values = [
        math.log1p(len(text)),
        math.log1p(part.count("\n")),
        math.log1p(len(words)),
        sum(map(len, words)) / max(1, len(words)),
        math.log1p(len(numbers)),
        sum(map(len, numbers)) / length,
        capitals / length,
        1 - len(plain) / length,
        math.log1p(part.count(".") + part.count("!")),
        min(3, part.count("?")),
        min(3, part.count(":")),
        min(4, part.count('"') + part.count("'")),
        math.log1p(part.count(",")),
        math.log1p(sum(map(part.count, "(){}[]<>=;`"))),
        float(part.rstrip().endswith("?")),
        math.log1p(len(later_lines.split())),
        math.log1p(sum(len(quoted.split()) for quoted in _QUOTED.findall(part))),
        math.log1p(len(first_line.split())),
        math.log1p(0.0 if _UNITS.isdisjoint(words) else _amount_tokens(tokens)),
        first_cue,
        *(math.log1p(cues.count(index)) for index in range(len(CUES))),
    ]
    return np.array(values, np.float32)


def _amount_tokens(tokens: list[str]) -> float:
    """Output tokens that a requested amount ("in 100 words", "three short paragraphs", "5 tips") comes to; 0 if none.

    Of several amounts, the largest.
    """
    largest = 0.0
    for index in [index for index, token in enumerate(tokens) if token in _UNITS]:
        tokens_each = _TOKENS_PER_UNIT[tokens[index].rstrip("s")]
        before = tokens[max(0, index - _MAX_TOKENS_TO_UNIT) : index]
        for distance, token in enumerate(reversed(before), start=1):
            count = float(token[:6]) if token[0] in _DIGITS else float(_NUMBERS.get(token, 0))
            if count != 1 or distance < _MAX_TOKENS_TO_UNIT:  # "a short paragraph", but not "a list of names"
                largest = max(largest, count * tokens_each)
    return min(largest, _MAX_AMOUNT_TOKENS)
