"""What can be read off a prompt that tells how long its answer gets. Pure: text in, two small vectors out.

The lexical features are cues that tell tasks apart: what is asked for, how much of it, how the prompt looks. They are
for English and source code; of other languages only the counts say something, and the word vector does the rest.
Similar prompts share words, so the word vector is a bag of word stems, each hashed to a fixed row of random signs
(feature hashing, Weinberger et al. 2009): it needs no download, no vocabulary and no model.
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
READ_CHARS = 2000
"""Of a longer prompt, half of this is read at its beginning and half at its end, where instructions are."""

_TOKEN = re.compile(r"[a-z]+|[0-9]+|[^\sa-z0-9]")
_BEFORE_WORDS, _AFTER_WORDS = "a", "{"
_CAPITALS, _DIGITS = ascii_uppercase.encode(), frozenset(digits)
_QUOTED = re.compile("[\"'\u201c\u2018]([^\"'\u201c\u201d\u2018\u2019\n]{3,400})[\"'\u201d\u2019]")
_STEM_CHARS = 6
_ROWS = 8192
_SEED = 7
_STOP_WORDS = frozenset(
    [
        "the",
        "a",
        "an",
        "of",
        "to",
        "in",
        "and",
        "is",
        "for",
        "on",
        "with",
        "that",
        "this",
        "it",
        "as",
        "by",
        "from",
        "be",
        "or",
        "are",
        "at",
    ]
)

_CUE_WORDS = {
    "compose": "write compose draft story essay poem article blog letter email speech script song post report plot",
    "explain": "explain describe discuss elaborate analyze analyse compare contrast why overview difference tell about",
    "list": "list example examples ideas tips steps ways reasons recommend recommendation recommendations suggest top "
    "outline recipe itinerary plan suggestions",
    "pick": "classify identify which choose select category categorize label true false yes no detect determine",
    "edit": "edit rewrite rephrase paraphrase correct translate convert change replace fix transform grammar spelling",
    "shorten": "summarize summarise summary extract find simplify condense headline title name",
    "reckon": "calculate compute solve many much total percent percentage average sum equation per each twice half",
    "program": "code function program python java javascript algorithm class script method application game",
    "snippet": "sql mysql query html css tag element loop statement regex array list variable expression line command",
    "atom": "synonym antonym symbol capital author year date color colour value output number noun verb adjective word "
    "term name opposite",
    "make": "create generate design develop build make construct implement invent produce",
    "ask": "what who when where how is are does do can did was will",
    "short": "brief briefly short concise concisely single only quick quickly just simply",
    "long": "detail detailed details long depth thorough thoroughly comprehensive complete full extensive step",
    "talk": "conversation dialogue role act pretend imagine you chat",
    "context": "given following below above passage text sentence paragraph input provided",
}
CUES = tuple(_CUE_WORDS)
_CUE_OF = {word: place for place, words in reversed(list(enumerate(_CUE_WORDS.values()))) for word in words.split()}

_NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
            "nine": 9, "ten": 10, "twenty": 20, "hundred": 100}  # fmt: skip
_TOKENS_OF = {"word": 1.4, "sentence": 25, "paragraph": 110, "page": 500, "line": 12, "name": 6, "tweet": 40,
              "item": 20, "example": 30, "idea": 30, "tip": 30, "step": 30, "way": 30, "reason": 35, "fact": 25,
              "question": 20, "point": 25}  # fmt: skip
_UNITS = frozenset(_TOKENS_OF) | {f"{unit}s" for unit in _TOKENS_OF}
_UNIT_WITHIN = 3
_MOST_AMOUNT = 20_000.0

NAMES = (
    "chars",
    "lines",
    "words",
    "word_chars",
    "numbers",
    "digits",
    "capitals",
    "foreign",
    "periods",
    "questions",
    "colons",
    "quotes",
    "commas",
    "brackets",
    "ends_asking",
    "payload_words",
    "quoted_words",
    "asking_words",
    "amount_tokens",
    "first_cue",
    *(f"{cue}_cues" for cue in CUES),
)
"""One for each lexical feature, in the order of the vector."""


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A prompt as it was read: ``lexical`` float32 [len(NAMES)], ``words`` float32 [WORD_DIM] of length 1 or 0."""

    lexical: Vector
    words: Vector


class Reader:
    """Reads prompts. Holds the rows that stems are hashed to: the same in every process, for ever."""

    def __init__(self) -> None:
        raw = np.random.PCG64(_SEED).random_raw(_ROWS * WORD_DIM // 64)  # raw bits never change between versions
        self._signs = np.unpackbits(raw.view(np.uint8)).reshape(_ROWS, WORD_DIM).astype(np.int8) * 2 - 1

    def read(self, text: str) -> Reading:
        """Both vectors of a prompt, from its `excerpt`; only the length is the whole text's."""
        part = excerpt(text)
        tokens = _TOKEN.findall(part.lower())
        words = [token for token in tokens if _BEFORE_WORDS <= token < _AFTER_WORDS]
        others = [token for token in tokens if not _BEFORE_WORDS <= token < _AFTER_WORDS]
        return Reading(_lexical(text, part, tokens, words, others), self._words(words, others))

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
    """The part of a prompt that is read."""
    if len(text) <= READ_CHARS:
        return text
    half = READ_CHARS // 2
    return f"{text[:half]}\n{text[-half:]}"


def _lexical(text: str, read: str, tokens: list[str], words: list[str], others: list[str]) -> Vector:
    numbers = [token for token in others if token[0].isdigit()]
    length = max(1, len(read))
    found = [_CUE_OF[word] for word in words if word in _CUE_OF]
    first = found[0] if found else -1
    asking, _, payload = read.strip().partition("\n")  # what is to be done, and what it is to be done with
    plain = read.encode("ascii", "ignore")
    capitals = len(plain) - len(plain.translate(None, _CAPITALS))
    values = [
        math.log1p(len(text)),
        math.log1p(read.count("\n")),
        math.log1p(len(words)),
        sum(map(len, words)) / max(1, len(words)),
        math.log1p(len(numbers)),
        sum(map(len, numbers)) / length,
        capitals / length,
        1 - len(plain) / length,
        math.log1p(read.count(".") + read.count("!")),
        min(3, read.count("?")),
        min(3, read.count(":")),
        min(4, read.count('"') + read.count("'")),
        math.log1p(read.count(",")),
        math.log1p(sum(map(read.count, "(){}[]<>=;`"))),
        float(read.rstrip().endswith("?")),
        math.log1p(len(payload.split())),
        math.log1p(sum(len(part.split()) for part in _QUOTED.findall(read))),
        math.log1p(len(asking.split())),
        math.log1p(0.0 if _UNITS.isdisjoint(words) else _amount_tokens(tokens)),
        first,
        *(math.log1p(found.count(place)) for place in range(len(CUES))),
    ]
    return np.array(values, np.float32)


def _amount_tokens(tokens: list[str]) -> float:
    """What "in 100 words", "three short paragraphs" or "5 tips" come to; 0 if nothing like that is asked for."""
    most = 0.0
    for place in [place for place, token in enumerate(tokens) if token in _UNITS]:
        each = _TOKENS_OF[tokens[place].rstrip("s")]
        for back, token in enumerate(reversed(tokens[max(0, place - _UNIT_WITHIN) : place]), start=1):
            count = float(token[:6]) if token[0] in _DIGITS else float(_NUMBERS.get(token, 0))
            if count != 1 or back < _UNIT_WITHIN:  # "a short paragraph", but not "a list of names"
                most = max(most, count * each)
    return min(most, _MOST_AMOUNT)
