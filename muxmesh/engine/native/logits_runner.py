"""A runner for forward passes that return logits to the host, where it samples the tokens. Knows no device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from muxmesh.device.kv_view import KvView
from muxmesh.engine.native.step_layout import StepLayout, lay_out
from muxmesh.engine.step import SampledToken, Step, StepOutcome
from muxmesh.engine.token_sampler import sample_token, token_logprobs
from muxmesh.types import TokenLogprobs


class Forward(Protocol):
    """A forward pass from token ids to logits. Writes the KV of the rows of a step into the pool."""

    def logits(self, layout: StepLayout) -> np.ndarray:
        """Computes the rows of a step; returns f32 [len(logit_rows), vocab_size], which the caller may change."""


OpenForward = Callable[[KvView], Forward]
"""Opens a compiled and warm forward pass over a pool. Raises ModelUnsupported."""


class LogitsRunner:
    """A `Runner` over any `Forward`. `run` needs `load` first."""

    def __init__(self, view: KvView, open_forward: OpenForward) -> None:
        self._view = view
        self._open_forward = open_forward

    def load(self) -> None:
        self._forward = self._open_forward(self._view)

    def run(self, step: Step) -> StepOutcome:
        logits = self._forward.logits(lay_out(step, self._view))
        sampled: dict[int, SampledToken] = {}
        prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        row = 0
        for chunk in step.chunks:
            rows = logits[row : row + chunk.num_logit_rows]
            row += chunk.num_logit_rows
            if chunk.scoring:
                # The last row of a prompt has no next token.
                scored = zip(rows, chunk.scoring.next_token_ids, strict=False)
                prompt_logprobs[chunk.job_id] = tuple(
                    token_logprobs(row_logits, token, chunk.scoring.num_candidates) for row_logits, token in scored
                )
            if chunk.sample is not None:
                sampled[chunk.job_id] = sample_token(rows[-1], chunk.sample)
        return StepOutcome(sampled, prompt_logprobs, step.num_tokens * self._view.shape.kv_bytes_per_token)
