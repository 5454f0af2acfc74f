"""What sampling on a device needs of a step, as arrays to upload.

Pure: knows NumPy, no torch and no device. A sample is a chunk with a `SampleSpec`; samples are numbered in the order of
the chunks. Logit rows are numbered as `StepLayout.logit_rows` orders them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from muxmesh.engine.philox import uniforms
from muxmesh.engine.step import Chunk, SampleSpec

WORD_BITS = 32
"""Tokens of one word of a mask."""
_NO_PENALTY = np.array([[1.0], [0.0], [0.0]], dtype=np.float32)
_MOST_TOP_K = 1 << 30  # more than any vocabulary, and an int32


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """Changes to the logits of samples before they are sampled. ``*_at`` int64 [2, n]: sample and token, each once.

    In order: ``bias`` f32 is added; where a bit of ``masks`` (int32 [m, words], bit i of word w is token 32 * w + i) is
    0, the logit of sample ``masked`` int64 [m] is -inf; logits are divided by ``factors`` f32 if positive, else
    multiplied; ``costs`` f32 [2, n] (frequency, presence) are subtracted one after the other.

    For the later steps of a run: ``counts`` f32 [n], how often the output has each counted token, and ``rates`` f32 [3,
    samples], the repetition, frequency and presence penalty of each sample.
    """

    bias_at: np.ndarray
    bias: np.ndarray
    masked: np.ndarray
    masks: np.ndarray
    penalized_at: np.ndarray
    factors: np.ndarray
    counted_at: np.ndarray
    costs: np.ndarray
    counts: np.ndarray
    rates: np.ndarray

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens that a run samples change the logits of its later steps."""
        return bool((self.rates != _NO_PENALTY).any())


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Tokens whose log-probabilities are requested: int64 [n] each.

    ``rows``: their logit rows. ``samples``: the sample whose token it is, -1 for a prompt token, which is then in
    ``token_ids``. ``num_candidates``: how many of the most likely tokens are needed, the most of all.
    """

    rows: np.ndarray
    samples: np.ndarray
    token_ids: np.ndarray
    num_candidates: int


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """How to sample after one step, or after each of a run of steps.

    sample_rows int64 [samples]: logit rows. parameters f64 [4, samples]: 1 / temperature as f32 (0: greedy), top-k (0:
    off), top-p, min-p as f32. uniforms f64 [steps, samples]: `token_sampler.uniform` in each step of a run.
    """

    num_logit_rows: int
    sample_rows: np.ndarray
    parameters: np.ndarray
    uniforms: np.ndarray
    edits: LogitEdits | None
    scored: ScoredTokens | None

    @property
    def is_plain(self) -> bool:
        """True if `sample_rows` alone does it: each logit row is sampled; no edits, no log-probabilities."""
        return self.edits is None and self.scored is None and self.num_logit_rows == len(self.sample_rows)


def plan_sampling(chunks: Sequence[Chunk], vocab_size: int, num_steps: int = 1) -> SamplingPlan:
    """Returns the plan for the chunks of a run of ``num_steps`` steps, whose logits have ``vocab_size`` columns."""
    rows, specs = [], []
    num_rows = 0
    for chunk in chunks:
        num_rows += chunk.num_logit_rows
        if chunk.sample is not None:
            rows.append(num_rows - 1)
            specs.append(chunk.sample)
    return SamplingPlan(
        num_logit_rows=num_rows,
        sample_rows=np.array(rows, dtype=np.int64),
        parameters=row_parameters(specs),
        uniforms=uniforms_ahead(specs, num_steps),
        edits=_edits(specs, vocab_size),
        scored=_scored(chunks),
    )


def row_parameters(specs: Sequence[SampleSpec]) -> np.ndarray:
    """Returns ``SamplingPlan.parameters``."""
    columns = [
        (
            0.0 if spec.sampling.greedy else np.float32(1.0 / spec.sampling.temperature),
            min(spec.sampling.top_k, _MOST_TOP_K),
            spec.sampling.top_p,
            np.float32(spec.sampling.min_p),
        )
        for spec in specs
    ]
    return np.ascontiguousarray(np.array(columns, dtype=np.float64).reshape(-1, 4).T)


def uniforms_ahead(specs: Sequence[SampleSpec], num_steps: int) -> np.ndarray:
    """Returns the random numbers of the next ``num_steps`` output indices (f64 [num_steps, specs]); 0 if greedy."""
    is_greedy = [spec.sampling.greedy for spec in specs]
    if all(is_greedy):
        return np.zeros((num_steps, len(specs)))
    keys = [(spec.sampling.seed % 2**64, spec.sequence_index, spec.output_index) for spec in specs]
    seeds, sequence_indices, output_indices = np.array(keys, dtype=np.uint64).T
    numbers = uniforms(seeds, sequence_indices, output_indices + np.arange(num_steps, dtype=np.uint64)[:, None])
    numbers[:, is_greedy] = 0.0
    return numbers


def _edits(specs: Sequence[SampleSpec], vocab_size: int) -> LogitEdits | None:
    bias = [(i, token, value) for i, spec in enumerate(specs) for token, value in spec.sampling.logit_bias]
    masks = {i: mask for i, spec in enumerate(specs) if (mask := _mask(spec, vocab_size)) is not None}
    penalized, counted = [], []
    for i, spec in enumerate(specs):
        if not spec.sampling.has_penalties:
            continue
        if spec.sampling.repetition_penalty != 1.0:
            seen = np.unique(np.array([*spec.prompt_token_ids, *spec.output_token_ids], dtype=np.int64))
            penalized.append(_column_block(i, seen, np.full(len(seen), spec.sampling.repetition_penalty, np.float32)))
        if spec.output_token_ids:
            seen, counts = np.unique(np.array(spec.output_token_ids, dtype=np.int64), return_counts=True)
            frequency = np.float32(spec.sampling.frequency_penalty) * counts.astype(np.float32)
            presence = np.full(len(seen), spec.sampling.presence_penalty, np.float32)
            counted.append(_column_block(i, seen, np.stack([frequency, presence, counts.astype(np.float32)])))
    if not (bias or masks or any(spec.sampling.has_penalties for spec in specs)):
        return None
    penalized_at, factors = _joined(penalized, np.empty(0, np.float32))
    counted_at, (*costs, counts_of_all) = _joined(counted, np.empty((3, 0), np.float32))
    return LogitEdits(
        bias_at=np.array([(i, token) for i, token, _ in bias], dtype=np.int64).reshape(-1, 2).T,
        bias=np.array([value for _, _, value in bias], dtype=np.float32),
        masked=np.array(list(masks), dtype=np.int64),
        masks=np.stack(list(masks.values())) if masks else np.empty((0, 0), dtype=np.int32),
        penalized_at=penalized_at,
        factors=factors,
        counted_at=counted_at,
        costs=np.stack(costs),
        counts=counts_of_all,
        rates=_penalty_rates(specs),
    )


def _penalty_rates(specs: Sequence[SampleSpec]) -> np.ndarray:
    rates = [
        (spec.sampling.repetition_penalty, spec.sampling.frequency_penalty, spec.sampling.presence_penalty)
        for spec in specs
    ]
    return np.ascontiguousarray(np.array(rates, dtype=np.float32).T)


def _column_block(sample: int, token_ids: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([np.full_like(token_ids, sample), token_ids]), values


def _joined(blocks: Sequence[tuple[np.ndarray, np.ndarray]], none: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if not blocks:
        return np.empty((2, 0), dtype=np.int64), none
    return np.concatenate([at for at, _ in blocks], axis=1), np.concatenate([values for _, values in blocks], axis=-1)


def _mask(spec: SampleSpec, vocab_size: int) -> np.ndarray | None:
    """The tokens that may be sampled, one bit each (int32 [words]), or None for all."""
    allowed = spec.sampling.allowed_token_ids
    if not spec.banned and allowed is None and spec.token_bitmask is None:
        return None
    bits = np.ones(vocab_size, dtype=np.uint8) if allowed is None else np.zeros(vocab_size, dtype=np.uint8)
    if allowed is not None:
        bits[list(allowed)] = 1
    if spec.token_bitmask is not None:
        bits &= np.unpackbits(spec.token_bitmask.view(np.uint8), count=vocab_size, bitorder="little")
    bits[list(spec.banned)] = 0
    packed = np.packbits(bits, bitorder="little")
    words = -(-vocab_size // WORD_BITS)
    return np.pad(packed, (0, words * 4 - len(packed))).view(np.int32)


def _scored(chunks: Sequence[Chunk]) -> ScoredTokens | None:
    rows: list[int] = []
    samples: list[int] = []
    token_ids: list[int] = []
    num_candidates = first = sample = 0
    for chunk in chunks:
        end = first + chunk.num_logit_rows
        if chunk.scoring:
            # The last row of a prompt has no next token.
            known = chunk.scoring.next_token_ids[: end - first]
            rows += range(first, first + len(known))
            samples += [-1] * len(known)
            token_ids += known
            num_candidates = max(num_candidates, chunk.scoring.num_candidates)
        if chunk.sample is not None:
            if chunk.sample.sampling.logprobs is not None:
                rows.append(end - 1)
                samples.append(sample)
                token_ids.append(0)
                num_candidates = max(num_candidates, chunk.sample.sampling.logprobs)
            sample += 1
        first = end
    if not rows:
        return None
    return ScoredTokens(
        np.array(rows, dtype=np.int64),
        np.array(samples, dtype=np.int64),
        np.array(token_ids, dtype=np.int64),
        num_candidates,
    )
