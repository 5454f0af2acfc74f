"""Divides the logits of a step into passes, so that memory for them is bounded however long a scored prompt is. Pure.

With a vocabulary of 128,000 tokens, the logits of 2,048 rows are 1 GB.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from muxmesh.engine.api import Failed
from muxmesh.engine.native.cuda.sampling_outcome import SamplingOutcome
from muxmesh.engine.step import Chunk, SampledToken
from muxmesh.types import TokenLogprobs


def logit_passes(chunks: Sequence[Chunk], max_rows: int) -> list[list[Chunk]]:
    """Returns the chunks of each pass, in order, with at most ``max_rows`` rows with logits; at least one pass.

    A scored chunk with more rows is several chunks, in passes one after the other; the last has its sample.
    """
    passes: list[list[Chunk]] = [[]]
    num_rows = 0
    for chunk in chunks:
        for part in _parts(chunk, max_rows):
            if num_rows + part.num_logit_rows > max_rows:
                passes.append([])
                num_rows = 0
            passes[-1].append(part)
            num_rows += part.num_logit_rows
    return passes


def _parts(chunk: Chunk, max_rows: int) -> Iterable[Chunk]:
    length, scoring = len(chunk.token_ids), chunk.scoring
    if scoring is None or length <= max_rows:
        return [chunk]
    return [
        replace(
            chunk,
            start=chunk.start + first,
            token_ids=chunk.token_ids[first : first + max_rows],
            sample=chunk.sample if first + max_rows >= length else None,
            scoring=replace(scoring, next_token_ids=scoring.next_token_ids[first : first + max_rows]),
        )
        for first in range(0, length, max_rows)
    ]


def joined_outcome(passes: Iterable[SamplingOutcome]) -> SamplingOutcome:
    """Returns the outcome of a step from those of its passes. A sequence fails if it does in any of them."""
    sampled: dict[int, SampledToken] = {}
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
    failed: dict[int, Failed] = {}
    for outcome in passes:
        sampled |= outcome.sampled
        for job_id, logprobs in outcome.prompt_logprobs.items():
            prompt_logprobs[job_id] = prompt_logprobs.get(job_id, ()) + logprobs
        failed = {**outcome.failed, **failed}
    for job_id in failed:
        sampled.pop(job_id, None)
        prompt_logprobs.pop(job_id, None)
    return SamplingOutcome(sampled, prompt_logprobs, failed)
