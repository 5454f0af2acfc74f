"""From the array that a device computed for a `SamplingPlan` to tokens, log-probabilities and failures by job.

Pure: knows NumPy, no torch and no device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from muxmesh.engine.api import Failed
from muxmesh.engine.native.cuda.sampling_plan import SamplingPlan
from muxmesh.engine.native.logits_runner import not_finite
from muxmesh.engine.step import Chunk, SampledToken, SampleSpec
from muxmesh.engine.token_sampler import nothing_to_sample
from muxmesh.errors import SequenceFailed
from muxmesh.types import Candidate, TokenLogprobs


@dataclass(frozen=True, slots=True)
class SamplingOutcome:
    """The parts of a `StepOutcome` that sampling decides, by job id."""

    sampled: Mapping[int, SampledToken]
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs, ...]]
    failed: Mapping[int, Failed]


@dataclass(frozen=True, slots=True)
class SampledArrays:
    """What the device computed for a plan; see `sampling.Sampler.enqueue`.

    token_ids int64 [samples]; can_sample bool [samples]: some token may be sampled; is_finite bool [logit rows];
    logprobs f64, ranks int64 [scored]; top_ids int64, top_logprobs f64 [scored, candidates].
    """

    token_ids: np.ndarray
    can_sample: np.ndarray
    is_finite: np.ndarray
    logprobs: np.ndarray
    ranks: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray

    @classmethod
    def unpack(cls, plan: SamplingPlan, packed: np.ndarray, vocab_size: int) -> SampledArrays:
        """``packed``: int64, the fields one after the other."""
        samples = len(plan.sample_rows)
        scored = 0 if plan.scored is None else len(plan.scored.rows)
        candidates = 0 if plan.scored is None else min(plan.scored.num_candidates, vocab_size)
        sizes = (samples, samples, plan.num_logit_rows, scored, scored, scored * candidates, scored * candidates)
        parts = np.split(packed, np.cumsum(sizes))
        return cls(
            token_ids=parts[0],
            can_sample=parts[1] != 0,
            is_finite=parts[2] != 0,
            logprobs=parts[3].view(np.float64),
            ranks=parts[4],
            top_ids=parts[5].reshape(scored, candidates),
            top_logprobs=parts[6].view(np.float64).reshape(scored, candidates),
        )

    def token_logprobs(self, scored: int, token_id: int, num_candidates: int) -> TokenLogprobs:
        """Log-probabilities of the scored token at this index, and of the ``num_candidates`` most likely tokens."""
        top = zip(
            self.top_ids[scored, :num_candidates].tolist(),
            self.top_logprobs[scored, :num_candidates].tolist(),
            strict=True,
        )
        return TokenLogprobs(
            Candidate(token_id, float(self.logprobs[scored]), int(self.ranks[scored])),
            tuple(Candidate(likely, logprob, index + 1) for index, (likely, logprob) in enumerate(top)),
        )


def sampling_outcome(chunks: Sequence[Chunk], arrays: SampledArrays) -> SamplingOutcome:
    """Returns the outcome for the chunks that `plan_sampling` got, from what the device computed."""
    sampled: dict[int, SampledToken] = {}
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
    failed: dict[int, Failed] = {}
    first = sample = scored = 0
    for chunk in chunks:
        end = first + chunk.num_logit_rows
        is_finite = arrays.is_finite[first:end]
        num_prompt = min(len(chunk.scoring.next_token_ids), end - first) if chunk.scoring else 0
        if not is_finite.all():
            failed[chunk.job_id] = not_finite(chunk, is_finite)
        elif chunk.scoring:
            prompt_logprobs[chunk.job_id] = tuple(
                arrays.token_logprobs(scored + i, chunk.scoring.next_token_ids[i], chunk.scoring.num_candidates)
                for i in range(num_prompt)
            )
        scored += num_prompt
        if chunk.sample is not None:
            if chunk.job_id not in failed:
                outcome = _sampled_token(chunk.sample, arrays, sample, scored)
                if isinstance(outcome, Failed):
                    failed[chunk.job_id] = outcome
                else:
                    sampled[chunk.job_id] = outcome
            scored += chunk.sample.sampling.logprobs is not None
            sample += 1
        first = end
    return SamplingOutcome(sampled, prompt_logprobs, failed)


def _sampled_token(spec: SampleSpec, arrays: SampledArrays, sample: int, scored: int) -> SampledToken | Failed:
    if not arrays.can_sample[sample]:
        return Failed(nothing_to_sample(spec.output_index), SequenceFailed)
    token_id, count = int(arrays.token_ids[sample]), spec.sampling.logprobs
    return SampledToken(token_id, None if count is None else arrays.token_logprobs(scored, token_id, count))
