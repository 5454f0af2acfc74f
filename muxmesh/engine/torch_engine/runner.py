"""The torch runner: maps the weight image, computes steps over the pool, draws tokens. Knows no device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from muxmesh.engine.kv_view import KvView
from muxmesh.engine.sampling import draw_token, token_logprobs
from muxmesh.engine.step import Drawn, Step, StepOutcome
from muxmesh.engine.torch_engine.layout import StepLayout, lay_out
from muxmesh.types import TokenLogprobs


class Forward(Protocol):
    """The device seam: everything between tokens and logits. It writes the KV of a step's rows into the pool."""

    def logits(self, layout: StepLayout) -> np.ndarray:
        """Computes the rows of a step; f32 [len(logit_rows), vocab_size], the caller's to change."""


OpenForward = Callable[[KvView], Forward]
"""Makes a forward pass over a pool, compiled and warm. Raises ModelUnsupported."""


class TorchRunner:
    """A `Runner` over any `Forward`."""

    def __init__(self, view: KvView, open_forward: OpenForward) -> None:
        self._view = view
        self._open_forward = open_forward

    def load(self) -> None:
        """See `Runner`."""
        self._forward = self._open_forward(self._view)

    def run(self, step: Step) -> StepOutcome:
        """See `Runner`."""
        logits = self._forward.logits(lay_out(step, self._view))
        drawn: dict[int, Drawn] = {}
        scored: dict[int, tuple[TokenLogprobs, ...]] = {}
        row = 0
        for chunk in step.chunks:
            rows = logits[row : row + chunk.num_logit_rows]
            row += chunk.num_logit_rows
            if chunk.score:
                followed = zip(rows, chunk.score.next_token_ids, strict=False)  # nothing follows the last of all
                scored[chunk.job_id] = tuple(
                    token_logprobs(line, token, chunk.score.num_candidates) for line, token in followed
                )
            if chunk.draw is not None:
                drawn[chunk.job_id] = draw_token(rows[-1], chunk.draw)
        return StepOutcome(drawn, scored, step.num_tokens * self._view.shape.kv_bytes_per_token)
