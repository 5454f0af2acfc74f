"""One step of an engine as plain values: the scheduler plans it, a runner computes it, the scheduler applies it.

Knows no job beyond its id, and no memory beyond block ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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

    def following(self, token_id: int) -> Chunk:
        """The chunk of the next step in a run of steps, after ``token_id`` was sampled."""
        assert self.sample is not None, "a token is sampled after the chunk"
        sample = replace(self.sample, output_index=self.sample.output_index + 1)
        return replace(self, start=self.start + len(self.token_ids), token_ids=(token_id,), sample=sample)


@dataclass(frozen=True, slots=True)
class Step:
    """Chunks of different jobs that are computed together, in one pass over the weights.

    ``num_steps`` > 1 allows a run of steps: step i + 1 computes the tokens that step i sampled, each at the next
    position, and samples at the next output index. Every chunk then has one token and a `SampleSpec` without a bitmask,
    whose ``banned`` holds for the whole run, and its blocks have a slot for each of the run's positions. For penalties,
    the tokens that the run has sampled are output tokens too.
    """

    chunks: tuple[Chunk, ...]
    num_steps: int = 1
    """How many steps a runner may compute before it returns; at least 1."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all chunks, in each step."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def shape(self) -> StepShape:
        """What the duration of the first step depends on."""
        return self.mean_shape(1)

    def mean_shape(self, num_steps: int) -> StepShape:
        """The mean of the shapes of the first ``num_steps`` steps, so that a fit sees the time of one step."""
        context = sum(context_of(chunk.start, len(chunk.token_ids)) for chunk in self.chunks)
        return StepShape(self.num_tokens, context + (num_steps - 1) * len(self.chunks) // 2, len(self.chunks))


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A sampled token, with its log-probabilities if they are requested."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a runner computed. ``kv_bytes_written``: bytes of KV that its steps wrote into the pool."""

    sampled: Mapping[int, tuple[SampledToken, ...]]
    """Job id → the token that each of the ``num_steps`` steps sampled, in order, for each chunk with a `SampleSpec`."""
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    """Job id → log-probabilities of ``next_token_ids``, for each chunk with a `PromptScoring`."""
    kv_bytes_written: int = 0
    failed: Mapping[int, Failed] = field(default_factory=dict)
    """Job id → why its sequence cannot continue. The step that failed does not count as computed and has no token;
    tokens of earlier steps of the run are in ``sampled``."""
    num_steps: int = 1
    """Steps that were computed: at least 1, at most ``Step.num_steps``."""


class Runner(Protocol):
    """Computes steps, sampling included, so that a device may sample by itself. Blocks; called from one thread."""

    @property
    def max_steps(self) -> int:
        """The longest run of steps that `run` computes; 1 if every token passes through the host."""

    def load(self) -> None:
        """Loads the model and warms up, unless it is loaded. Raises ModelUnsupported if it cannot be loaded."""

    def unload(self, drop_weights: bool) -> None:
        """Ends its threads and frees what only `run` needs. `load` makes it usable again.

        ``drop_weights``: also the weights. The runner may not be loaded, or be unloaded already.
        """

    def run(self, step: Step, may_continue: Callable[[], bool]) -> StepOutcome:
        """Computes ``step.num_steps`` steps, or fewer. The device has finished all of it when this returns or raises.

        Before it begins each step after the first, it calls ``may_continue``, from its own thread; False ends the run
        with the steps so far. A runner that enqueues ahead of the device has at most one step enqueued behind the one
        that the device computes, so that the device is free after at most one more step.

        A sequence that fails or ends in the middle may be computed until the end of the run: what that writes is in
        its own blocks, and no token that is sampled then is used. After an exception the runner stays usable, and may
        be given the same chunks again. Raises DeviceLost if no step can be computed any more: that ends the engine.
        """
