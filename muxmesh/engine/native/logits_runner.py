"""A runner for forward passes that return logits to the host, where it samples the tokens. Knows no device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from muxmesh.device.kv_view import KvView
from muxmesh.engine.api import Failed
from muxmesh.engine.native.step_layout import StepLayout, lay_out
from muxmesh.engine.step import Chunk, SampledToken, Step, StepOutcome
from muxmesh.engine.token_sampler import sample_token, token_logprobs
from muxmesh.errors import SequenceFailed
from muxmesh.types import TokenLogprobs


class Forward(Protocol):
    """A forward pass from token ids to logits. Writes the KV of the rows of a step into the pool."""

    def logits(self, layout: StepLayout) -> np.ndarray:
        """Computes the rows of a step; returns f32 [len(logit_rows), vocab_size], which the caller may change."""

    def rest(self) -> None:
        """Ends its threads and frees its activations, until `logits` is called again."""


OpenForward = Callable[[KvView], Forward]
"""Opens a compiled and warm forward pass over a pool. Raises ModelUnsupported."""


class LogitsRunner:
    """A `Runner` over any `Forward`. `run` needs `load` first.

    Computes one step at a time: the host samples, so no token could be fed back without it.
    """

    max_steps = 1

    def __init__(self, view: KvView, open_forward: OpenForward, on_dropped: Callable[[], None] = lambda: None) -> None:
        """``on_dropped`` is called when nothing here uses the weights any more."""
        self._view = view
        self._open_forward = open_forward
        self._on_dropped = on_dropped
        self._forward: Forward | None = None

    def load(self) -> None:
        if self._forward is None:
            self._forward = self._open_forward(self._view)

    def unload(self, drop_weights: bool) -> None:
        if self._forward is not None:
            self._forward.rest()
        if drop_weights:
            self._forward = None
            self._on_dropped()

    def run(self, step: Step, may_continue: Callable[[], bool] = lambda: False) -> StepOutcome:
        assert self._forward is not None, "it is loaded"
        logits = self._forward.logits(lay_out(step, self._view))
        # The maximum is finite unless the row has NaN or inf, or nothing but -inf.
        is_finite = np.isfinite(logits.max(axis=1, initial=-np.inf))
        sampled: dict[int, tuple[SampledToken, ...]] = {}
        prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        failed: dict[int, Failed] = {}
        first = 0
        for chunk in step.chunks:
            rows = slice(first, first + chunk.num_logit_rows)
            first = rows.stop
            if not is_finite[rows].all():
                failed[chunk.job_id] = not_finite(chunk, is_finite[rows])
                continue
            if chunk.scoring:
                # The last row of a prompt has no next token.
                scored = zip(logits[rows], chunk.scoring.next_token_ids, strict=False)
                prompt_logprobs[chunk.job_id] = tuple(
                    token_logprobs(row, token, chunk.scoring.num_candidates) for row, token in scored
                )
            if chunk.sample is not None:
                try:
                    sampled[chunk.job_id] = (sample_token(logits[rows][-1], chunk.sample),)
                except SequenceFailed as error:
                    failed[chunk.job_id] = Failed(str(error), SequenceFailed)
        num_bytes = step.num_tokens * self._view.shape.kv_bytes_per_token
        return StepOutcome(sampled, prompt_logprobs, num_bytes, failed)


def not_finite(chunk: Chunk, is_finite: np.ndarray) -> Failed:
    """Why a chunk fails. ``is_finite`` has a value for each of its rows with logits."""
    position = chunk.start + len(chunk.token_ids) - len(is_finite) + int(np.argmin(is_finite))
    return Failed(
        f"the model computed logits that are not finite after the token at position {position}; "
        "its weights overflow or are damaged",
        SequenceFailed,
    )
