"""Prompts that were answered, and how long: a ring, for retrieval and to learn from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from muxmesh.predictor.prompt_features import NAMES, WORD_DIM, Reading
from muxmesh.predictor.regression import Examples, Matrix

_SIMILAR = 0.9
"""Cosine of word vectors from which on prompts are taken to get like answers."""
_NUM_PLANES, _MOST_APART = 128, 34
"""Only prompts whose word vectors lie on the same side of nearly all of some random planes are looked at closer, so
most memory is never read. Of the planes, the angle between two vectors over π parts them (Charikar 2002): 18 of 128 at
a cosine of 0.9, with a standard deviation of 4. Fewer than 256: they are counted in a byte."""
_MOST_ANSWERS = 32
_MOST_NEIGHBOURS = 16
_PRIOR_ANSWERS = 4
_RATE = 1 / 500


@dataclass(slots=True)
class Scale:
    """Running mean and standard deviation of a model's log lengths. The last few hundred answers count."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Scale:
        """From its fields, as a snapshot has them. Raises ValueError or TypeError if they are something else."""
        count, mean, variance = values
        if (
            not (count >= 0 and math.isfinite(count) and math.isfinite(mean) and math.isfinite(variance))
            or variance < 0
        ):
            raise ValueError("a scale is no number")
        return cls(int(count), float(mean), float(variance))

    def add(self, value: float) -> None:
        """Takes in a log length."""
        self.count += 1
        rate = max(1 / self.count, _RATE)
        difference = value - self.mean
        self.mean += rate * difference
        self.variance += rate * ((1 - rate) * difference**2 - self.variance)

    def towards(self, everyone: Scale) -> tuple[float, float]:
        """Mean and standard deviation; after few answers those of all models count as well."""
        own = self.count / (self.count + _PRIOR_ANSWERS)
        mean = own * self.mean + (1 - own) * everyone.mean
        variance = own * self.variance + (1 - own) * everyone.variance
        return mean, max(math.sqrt(variance), 0.05)


@dataclass(slots=True)
class _Answers:
    """What is known of one prompt: pairs of model and log length, the latest last."""

    prompt_hash: int
    lengths: list[tuple[str, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Answered prompts like the one asked about: how many answers, weighted by likeness, and their mean."""

    num_answers: float
    mean: float


class History:
    """Owns the ring and the scale of each model. Invariant: a prompt has one row, the latest ``capacity`` are here."""

    def __init__(self, capacity: int = 4096) -> None:
        self.capacity = capacity
        self._words = np.zeros((capacity, WORD_DIM), np.float32)
        self._planes = np.random.default_rng(0).standard_normal((WORD_DIM, _NUM_PLANES), np.float32)
        self._sides = np.zeros((_NUM_PLANES // 64, capacity), np.uint64)
        self._lexical = np.zeros((capacity, len(NAMES)), np.float32)
        self._answers: list[_Answers] = []
        self._row_of: dict[int, int] = {}
        self._next = 0
        self._everyone = Scale()
        self._scales: dict[str, Scale] = {}
        self.num_observed = 0
        self.num_rows = 0
        """Prompts that ever got a row."""

    def __len__(self) -> int:
        return len(self._answers)

    def scale(self, model: str) -> tuple[float, float]:
        """Mean and standard deviation of the model's log lengths; of all models' if it is new."""
        return self._scales.get(model, Scale()).towards(self._everyone)

    def add(self, prompt_hash: int, reading: Reading, model: str, log_length: float) -> None:
        """An answer ended."""
        self.num_observed += 1
        self._everyone.add(log_length)
        self._scales.setdefault(model, Scale()).add(log_length)
        row = self._row_of.get(prompt_hash)
        if row is None:
            row = self._fresh_row(prompt_hash)
            self._words[row], self._lexical[row] = reading.words, reading.lexical
            self._sides[:, row] = self._sides_of(reading.words)
        lengths = self._answers[row].lengths
        lengths.append((model, log_length))
        del lengths[:-_MOST_ANSWERS]

    def neighbours(self, reading: Reading) -> Neighbours | None:
        """Answers to prompts that read like this one; None if there is none. In standardised log length."""
        if not self._answers:
            return None
        sides = self._sides_of(reading.words)
        apart = np.bitwise_count(self._sides[:, : len(self)] ^ sides[:, None]).sum(0, np.uint8)
        maybe = np.flatnonzero(apart <= _MOST_APART)
        if len(maybe) == 0:
            return None
        nearness = (self._words[maybe] @ reading.words - _SIMILAR) / (1 - _SIMILAR)
        nearest = np.argsort(-nearness)[:_MOST_NEIGHBOURS]
        scales: dict[str, tuple[float, float]] = {}
        weight = total = 0.0
        for row, near in zip(maybe[nearest].tolist(), nearness[nearest].tolist(), strict=True):
            if near <= 0:
                break
            for model, length in self._answers[row].lengths:
                mean, deviation = scales.get(model) or scales.setdefault(model, self.scale(model))
                weight += near**2
                total += near**2 * (length - mean) / deviation
        return Neighbours(weight, total / weight) if weight > 0 else None

    def examples(self, most: int) -> Examples:
        """The latest rows, oldest first."""
        rows = self._oldest_first()[-most:]
        known = [self._answers[row].lengths for row in rows]
        scales = {model: self.scale(model) for model in self._scales}
        targets = [
            sum((length - scales[model][0]) / scales[model][1] for model, length in lengths) / len(lengths)
            for lengths in known
        ]
        return Examples(
            self._lexical[rows],
            self._words[rows],
            np.array(targets, np.float32),
            np.array([len(lengths) for lengths in known], np.int32),
        )

    def dump(self) -> tuple[Matrix, Matrix, dict[str, Any]]:
        """Word vectors and lexical features, oldest first, and the rest as JSON can say it."""
        rows = self._oldest_first()
        answers = [[self._answers[row].prompt_hash, self._answers[row].lengths] for row in rows]
        scales = {model: astuple(scale) for model, scale in self._scales.items()}
        known = {"answers": answers, "scales": scales, "everyone": astuple(self._everyone), "num": self.num_observed}
        return self._words[rows], self._lexical[rows], known

    def load(self, words: Matrix, lexical: Matrix, known: Mapping[str, Any]) -> None:
        """Takes the place of what `dump` gave. Raises ValueError, KeyError or TypeError if it is something else."""
        scales = {model: Scale.of(values) for model, values in known["scales"].items()}
        answers = [
            _Answers(int(prompt_hash), [(model, float(length)) for model, length in lengths])
            for prompt_hash, lengths in known["answers"]
        ]
        finite = bool(np.isfinite(words).all() and np.isfinite(lexical).all())
        shapes = (len(answers), WORD_DIM), (len(answers), len(NAMES))
        if (words.shape, lexical.shape) != shapes or not finite or not _all_known(answers, scales):
            raise ValueError("the rows and the answers do not belong together")
        keep = min(len(answers), self.capacity)
        answers, words, lexical = answers[-keep:] if keep else [], words[-keep:], lexical[-keep:]
        self._answers = answers
        self._words[:keep], self._lexical[:keep] = words[:keep], lexical[:keep]
        self._sides[:, :keep] = self._sides_of(words).T
        self._row_of = {one.prompt_hash: row for row, one in enumerate(answers)}
        self._next = keep % self.capacity
        self._scales, self._everyone = scales, Scale.of(known["everyone"])
        self.num_observed = int(known["num"])
        self.num_rows = keep

    def _sides_of(self, words: npt.NDArray[np.float32]) -> npt.NDArray[np.uint64]:
        """A bit for each plane: [..., WORD_DIM] to [..., _NUM_PLANES // 64]."""
        return np.packbits(words @ self._planes > 0, axis=-1).view(np.uint64)

    def _oldest_first(self) -> list[int]:
        first = self._next if len(self) == self.capacity else 0
        return [*range(first, len(self)), *range(first)]

    def _fresh_row(self, prompt_hash: int) -> int:
        if len(self) < self.capacity:
            self._answers.append(_Answers(prompt_hash))
            row = len(self) - 1
        else:
            row = self._next
            del self._row_of[self._answers[row].prompt_hash]
            self._answers[row] = _Answers(prompt_hash)
        self._next = (row + 1) % self.capacity
        self._row_of[prompt_hash] = row
        self.num_rows += 1
        return row


def _all_known(answers: Sequence[_Answers], scales: Mapping[str, Scale]) -> bool:
    return all(one.lengths and all(model in scales for model, _ in one.lengths) for one in answers)
