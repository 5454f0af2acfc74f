"""The latest prompts with the lengths of their outputs: a ring, for retrieval of similar prompts and for fits.

Knows features and lengths, no text. Lengths are natural logarithms of tokens. A prompt belongs to one tenant, and is
retrieved for that tenant only; fits and the statistics of a model are over all tenants, but few outputs are no
statistics for a tenant that has none of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from muxmesh.predictor.prompt_features import LEXICAL_NAMES, WORD_DIM, PromptFeatures
from muxmesh.predictor.regression import Examples, Matrix

_MIN_COSINE = 0.9
"""Of the word vectors of two prompts. From here on their outputs are taken to be similar."""
_SIGNATURE_BITS, _MAX_DIFFERING_BITS = 128, 34
"""Cosines are computed only for prompts whose signatures differ in few bits, so that most rows are never read. A bit is
the side of a random hyperplane on which the word vector lies. The share of differing bits is the angle between the
vectors over π (Charikar 2002): at a cosine of 0.9, 18 of 128 with a standard deviation of 4. The differing bits are
counted in a uint8, so there have to be fewer than 256."""
_MAX_OUTPUTS_PER_PROMPT = 32
_MAX_NEIGHBOURS = 16
_MIN_SHARED_OUTPUTS = 8
"""The mean of fewer outputs would show a tenant the lengths of another one."""
_PRIOR_OUTPUTS = 4
_PRIOR_VARIANCE = 1.0
"""Of log lengths, as long as few are known."""
_MIN_RATE = 1 / 500
_MIN_DEVIATION = 0.05


@dataclass(slots=True)
class LengthStats:
    """Running mean and variance of log lengths, over about the last 500 outputs."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    @classmethod
    def from_fields(cls, values: Sequence[float]) -> LengthStats:
        """From the values of its fields. Raises ValueError or TypeError if they are not such values."""
        count, mean, variance = values
        if not (all(map(math.isfinite, (count, mean, variance))) and count >= 0 and variance >= 0):
            raise ValueError(f"length statistics are count, mean and variance, not {values}")
        return cls(int(count), float(mean), float(variance))

    def add(self, log_length: float) -> None:
        """Adds an output."""
        self.count += 1
        rate = max(1 / self.count, _MIN_RATE)
        difference = log_length - self.mean
        self.mean += rate * difference
        self.variance += rate * ((1 - rate) * difference**2 - self.variance)

    def shrunk_towards(self, prior: LengthStats) -> tuple[float, float]:
        """Mean and standard deviation of the mixture with ``prior``."""
        mixed = self.mixed_with(prior)
        return mixed.mean, max(math.sqrt(mixed.variance), _MIN_DEVIATION)

    def mixed_with(self, prior: LengthStats) -> LengthStats:
        """With the mean and the variance of the mixture with ``prior``, which weighs as much as a few outputs."""
        own = self.count / (self.count + _PRIOR_OUTPUTS)
        return LengthStats(
            self.count, own * self.mean + (1 - own) * prior.mean, own * self.variance + (1 - own) * prior.variance
        )


@dataclass(slots=True)
class _PromptOutputs:
    """The outputs of one prompt of one tenant: pairs of model and log length, the latest last."""

    prompt_hash: int
    tenant_id: int
    lengths: list[tuple[str, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Outputs of prompts similar to a given one: their number, weighted by similarity, and their mean.

    The mean is in standardised log length.
    """

    num_outputs: float
    mean: float


class History:
    """Owns a ring of prompts, and the length statistics of each model.

    Invariant: a prompt has one row, and the ring holds the ``capacity`` prompts that were added last.
    """

    def __init__(self, capacity: int = 4096) -> None:
        self.capacity = capacity
        self._words = np.zeros((capacity, WORD_DIM), np.float32)
        self._planes = np.random.default_rng(0).standard_normal((WORD_DIM, _SIGNATURE_BITS), np.float32)
        self._signatures = np.zeros((_SIGNATURE_BITS // 64, capacity), np.uint64)
        self._lexical = np.zeros((capacity, len(LEXICAL_NAMES)), np.float32)
        self._tenants = np.zeros(capacity, np.uint64)
        self._outputs: list[_PromptOutputs] = []
        self._row_of: dict[int, int] = {}
        self._next_row = 0
        self._all_models = LengthStats()
        self._stats: dict[str, LengthStats] = {}
        self.num_observed = 0
        """Outputs ever added."""
        self.num_rows = 0
        """Rows ever filled; `len` is the number of rows that the ring holds."""

    def __len__(self) -> int:
        return len(self._outputs)

    def is_cold(self, tenant_id: int) -> bool:
        """Whether there is nothing to predict from for this tenant: no output, or a few that are all of others."""
        if self.num_observed >= _MIN_SHARED_OUTPUTS:
            return False
        return not (self._tenants[: len(self)] == tenant_id).any()

    def scale(self, model: str) -> tuple[float, float]:
        """Mean and standard deviation of the model's log lengths; those of all models if it is new.

        A few outputs of about equal length say little about the lengths to come, so the deviation begins at 1.
        """
        pooled = self._all_models.mixed_with(LengthStats(mean=self._all_models.mean, variance=_PRIOR_VARIANCE))
        return self._stats.get(model, LengthStats()).shrunk_towards(pooled)

    def add(
        self, prompt_hash: int, features: PromptFeatures, model: str, log_length: float, tenant_id: int = 0
    ) -> None:
        """Adds an output. A prompt that the ring holds keeps its row and its features.

        ``prompt_hash`` differs between tenants.
        """
        self.num_observed += 1
        self._all_models.add(log_length)
        self._stats.setdefault(model, LengthStats()).add(log_length)
        row = self._row_of.get(prompt_hash)
        if row is None:
            row = self._fresh_row(prompt_hash, tenant_id)
            self._words[row], self._lexical[row] = features.words, features.lexical
            self._signatures[:, row] = self._signatures_of(features.words)
        lengths = self._outputs[row].lengths
        lengths.append((model, log_length))
        del lengths[:-_MAX_OUTPUTS_PER_PROMPT]

    def neighbours(self, features: PromptFeatures, tenant_id: int = 0) -> Neighbours | None:
        """Outputs of the tenant's prompts that are most similar to this one; None if none is similar enough."""
        if not self._outputs:
            return None
        signature = self._signatures_of(features.words)
        differing = np.bitwise_count(self._signatures[:, : len(self)] ^ signature[:, None]).sum(0, np.uint8)
        candidates = np.flatnonzero((differing <= _MAX_DIFFERING_BITS) & (self._tenants[: len(self)] == tenant_id))
        if len(candidates) == 0:
            return None
        similarity = (self._words[candidates] @ features.words - _MIN_COSINE) / (1 - _MIN_COSINE)
        nearest = np.argsort(-similarity)[:_MAX_NEIGHBOURS]
        scales: dict[str, tuple[float, float]] = {}
        weight = total = 0.0
        for row, similar in zip(candidates[nearest].tolist(), similarity[nearest].tolist(), strict=True):
            if similar <= 0:
                break
            for model, length in self._outputs[row].lengths:
                mean, deviation = scales.get(model) or scales.setdefault(model, self.scale(model))
                weight += similar**2
                total += similar**2 * (length - mean) / deviation
        return Neighbours(weight, total / weight) if weight > 0 else None

    def examples(self, max_rows: int) -> Examples:
        """The latest rows, at most ``max_rows``, oldest first."""
        rows = self._oldest_first()[-max_rows:]
        lengths_of_rows = [self._outputs[row].lengths for row in rows]
        scales = {model: self.scale(model) for model in self._stats}
        targets = [
            sum((length - scales[model][0]) / scales[model][1] for model, length in lengths) / len(lengths)
            for lengths in lengths_of_rows
        ]
        return Examples(
            self._lexical[rows],
            self._words[rows],
            np.array(targets, np.float32),
            np.array([len(lengths) for lengths in lengths_of_rows], np.int32),
            self._tenants[rows],
        )

    def dump(self) -> tuple[Matrix, Matrix, dict[str, Any]]:
        """Copies of the word vectors and lexical features, in the order of the ring, and the rest as JSON values."""
        state = {
            "outputs": [[one.prompt_hash, one.tenant_id, list(one.lengths)] for one in self._outputs],
            "next_row": self._next_row,
            "num_rows": self.num_rows,
            "stats": {model: astuple(stats) for model, stats in self._stats.items()},
            "all_models": astuple(self._all_models),
            "num_observed": self.num_observed,
        }
        return self._words[: len(self)].copy(), self._lexical[: len(self)].copy(), state

    def load(self, words: Matrix, lexical: Matrix, state: Mapping[str, Any]) -> None:
        """Replaces everything by what `dump` returned; of more rows than ``capacity``, the latest are kept.

        Raises ValueError, KeyError, TypeError or AttributeError, and then changes nothing, if the arguments are no such
        values.
        """
        stats = {model: LengthStats.from_fields(values) for model, values in state["stats"].items()}
        all_models, num_observed = LengthStats.from_fields(state["all_models"]), int(state["num_observed"])
        outputs = [
            _PromptOutputs(int(prompt_hash), int(tenant_id), [(model, float(length)) for model, length in lengths])
            for prompt_hash, tenant_id, lengths in state["outputs"]
        ]
        is_finite = bool(np.isfinite(words).all() and np.isfinite(lexical).all())
        shapes = (len(outputs), WORD_DIM), (len(outputs), len(LEXICAL_NAMES))
        if (words.shape, lexical.shape) != shapes or not is_finite or not _are_complete(outputs, stats):
            raise ValueError("the rows and the outputs do not belong together")
        tenants = np.array([one.tenant_id for one in outputs], np.uint64)
        next_row, num_rows = int(state["next_row"]), int(state["num_rows"])
        if not 0 <= next_row <= len(outputs) <= num_rows:
            raise ValueError(f"row {next_row} of {len(outputs)} is the next one")
        if len(outputs) != self.capacity:
            order = [*range(next_row, len(outputs)), *range(next_row)][-self.capacity :]  # the oldest row first
            outputs, words, lexical, tenants = (
                [outputs[row] for row in order],
                words[order],
                lexical[order],
                tenants[order],
            )
            next_row = len(outputs) % self.capacity
        keep = len(outputs)
        self._outputs = outputs
        self._words[:keep], self._lexical[:keep], self._tenants[:keep] = words, lexical, tenants
        self._signatures[:, :keep] = self._signatures_of(words).T
        self._row_of = {one.prompt_hash: row for row, one in enumerate(outputs)}
        self._next_row, self.num_rows = next_row % self.capacity, num_rows
        self._stats, self._all_models, self.num_observed = stats, all_models, num_observed

    def _signatures_of(self, words: npt.NDArray[np.float32]) -> npt.NDArray[np.uint64]:
        """[..., WORD_DIM] to [..., _SIGNATURE_BITS // 64], one bit for each hyperplane."""
        return np.packbits(words @ self._planes > 0, axis=-1).view(np.uint64)

    def _oldest_first(self) -> list[int]:
        first = self._next_row if len(self) == self.capacity else 0
        return [*range(first, len(self)), *range(first)]

    def _fresh_row(self, prompt_hash: int, tenant_id: int) -> int:
        if len(self) < self.capacity:
            self._outputs.append(_PromptOutputs(prompt_hash, tenant_id))
            row = len(self) - 1
        else:
            row = self._next_row
            del self._row_of[self._outputs[row].prompt_hash]
            self._outputs[row] = _PromptOutputs(prompt_hash, tenant_id)
        self._next_row = (row + 1) % self.capacity
        self._row_of[prompt_hash] = row
        self._tenants[row] = tenant_id
        self.num_rows += 1
        return row


def _are_complete(outputs: Sequence[_PromptOutputs], stats: Mapping[str, LengthStats]) -> bool:
    """True if each prompt is there once, with finite lengths of models that have statistics."""
    lengths = [length for one in outputs for length in one.lengths]
    is_unique = len({one.prompt_hash for one in outputs}) == len(outputs)
    is_known = all(model in stats and math.isfinite(length) for model, length in lengths)
    return is_unique and is_known and all(one.lengths for one in outputs)
