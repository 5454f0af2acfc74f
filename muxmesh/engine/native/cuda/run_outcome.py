"""What a run of decode steps sampled, from what the device computed in each of them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from muxmesh.engine.api import Failed
from muxmesh.engine.native.cuda.sampling_kernel import SAMPLED
from muxmesh.engine.native.cuda.sampling_outcome import SampledArrays, sampling_outcome
from muxmesh.engine.step import Chunk, SampledToken

Sampled = Mapping[int, tuple[SampledToken, ...]]
"""`StepOutcome.sampled`."""


def plain_outcome(
    chunks: Sequence[Chunk], tokens: np.ndarray, statuses: np.ndarray
) -> tuple[Sampled, Mapping[int, Failed]]:
    """`run_outcome` of steps that were sampled plainly; tokens, statuses int64 [steps, chunks]: see `sample_rows`."""
    if (statuses == SAMPLED).all():
        return {
            chunk.job_id: tuple(map(SampledToken, of_job))
            for chunk, of_job in zip(chunks, tokens.T.tolist(), strict=True)
        }, {}
    none = np.empty(0)
    is_sampled = statuses == SAMPLED
    return run_outcome(
        chunks,
        [
            SampledArrays(of_step, is_ok, is_ok, none, none, none, none)
            for of_step, is_ok in zip(tokens, is_sampled, strict=True)
        ],
    )


def run_outcome(chunks: Sequence[Chunk], steps: Sequence[SampledArrays]) -> tuple[Sampled, Mapping[int, Failed]]:
    """Returns ``sampled`` and ``failed`` of the `StepOutcome` for a run that began with ``chunks``.

    A sequence that fails in a step has the tokens of the steps before.
    """
    sampled: dict[int, list[SampledToken]] = {chunk.job_id: [] for chunk in chunks}
    failed: dict[int, Failed] = {}
    for arrays in steps:
        outcome = sampling_outcome(chunks, arrays)
        for job_id, token in outcome.sampled.items():
            if job_id not in failed:
                sampled[job_id].append(token)
        for job_id, failure in outcome.failed.items():
            failed.setdefault(job_id, failure)
        token_ids = arrays.token_ids.tolist()  # of a sequence that failed, it may be any number
        chunks = [chunk.following(token_id) for chunk, token_id in zip(chunks, token_ids, strict=True)]
    return {job_id: tuple(tokens) for job_id, tokens in sampled.items() if tokens}, failed
