"""One step of an engine as plain values: the scheduler plans it, a runner computes it, the scheduler applies it.

Knows no job beyond its id, and no memory beyond block ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from muxmesh.engine.api import Failed
from muxmesh.step_cost import StepShape, context_of
from muxmesh.types import Sampling, TokenLogprobs


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """How to sample the token after a chunk.

    ``output_index``: its index in the output. ``banned``: tokens that are not sampled. ``sequence_index`` numbers the
    output sequences of one request. ``token_bitmask``: the tokens that may be sampled (uint32, bit i of word w is token
    ``32 * w + i``), None for all; at least one of them is not banned. ``prompt_token_ids`` and ``output_token_ids`` are
    the tokens so far if the sampling has penalties, else empty.
    """

    sampling: Sampling
    output_index: int
    banned: frozenset[int] = frozenset()
    sequence_index: int = 0
    prompt_token_ids: Sequence[int] = ()
    output_token_ids: Sequence[int] = ()
    token_bitmask: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class PromptScoring:
    """Log-probabilities to compute of prompt tokens: ``next_token_ids[i]`` follows token i of the chunk.

    ``num_candidates``: how many of the most likely tokens are reported at each position.
    """

    next_token_ids: tuple[int, ...]
    num_candidates: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of tokens of one job to compute: ``token_ids`` at positions [start, start + len(token_ids)).

    The job's KV is in ``block_ids``. ``sample`` is None if tokens of the job remain to be computed after the chunk.
    """

    job_id: int
    start: int
    token_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    sample: SampleSpec | None = None
    scoring: PromptScoring | None = None

    @property
    def num_logit_rows(self) -> int:
        """How many of the chunk's last tokens need logits."""
        return len(self.token_ids) if self.scoring else int(self.sample is not None)


@dataclass(frozen=True, slots=True)
class Step:
    """Chunks of different jobs that are computed together, in one pass over the weights."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all chunks."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def shape(self) -> StepShape:
        """What the step's duration depends on."""
        context = sum(context_of(chunk.start, len(chunk.token_ids)) for chunk in self.chunks)
        return StepShape(self.num_tokens, context, len(self.chunks))


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A sampled token, with its log-probabilities if they are requested."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a runner computed. ``kv_bytes_written``: bytes of KV that the step wrote into the pool."""

    sampled: Mapping[int, SampledToken]
    """Job id → the sampled token, for each chunk with a `SampleSpec`."""
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    """Job id → log-probabilities of ``next_token_ids``, for each chunk with a `PromptScoring`."""
    kv_bytes_written: int = 0
    failed: Mapping[int, Failed] = field(default_factory=dict)
    """Job id → why its sequence cannot continue. The job has no token, and its chunk does not count as computed."""


class Runner(Protocol):
    """Computes steps, sampling included, so that a device may sample by itself. Blocks; called from one thread."""

    def load(self) -> None:
        """Loads the model and warms up. Raises ModelUnsupported if it cannot be loaded."""

    def run(self, step: Step) -> StepOutcome:
        """Computes the step. After an exception the runner stays usable, and may be given the same chunks again."""
