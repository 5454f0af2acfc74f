"""Penalties in the steps of a run, in which the tokens that the run has sampled count as output too."""

from __future__ import annotations

import torch
from torch import Tensor

from muxmesh.engine.native.cuda.logit_edits import MAX_LOGIT, DeviceEdits


class RunPenalties:
    """Owns, for every token of each sample, its factor and how often the output has it: f32 [samples, vocabulary].

    Dense, because the next token may be any. The arithmetic is that of `DeviceEdits.penalize`, rounded at the same
    points: a factor of 1 and a count of 0 change nothing.
    """

    def __init__(self, edits: DeviceEdits, vocab_size: int) -> None:
        """``edits``: of the run's first step."""
        self._repetition, self._frequency, self._presence = edits.rates[:, :, None]
        shape = (edits.rates.shape[1], vocab_size)
        self._factors = torch.ones(shape, dtype=torch.float32, device=edits.rates.device)
        self._counts = torch.zeros_like(self._factors)
        self._factors[tuple(edits.penalized_at)] = edits.factors
        self._counts[tuple(edits.counted_at)] = edits.counts

    def count(self, token_ids: Tensor) -> None:
        """Adds the token that each sample has sampled (int64 [samples]). Ids of failed samples may be out of range."""
        at = token_ids.clamp(0, self._counts.shape[1] - 1)[:, None]
        self._factors.scatter_(1, at, self._repetition)
        self._counts.scatter_add_(1, at, torch.ones_like(self._repetition))

    def penalize(self, logits: Tensor) -> None:
        """Changes ``logits`` (f32 [samples, vocabulary]) in place. Allocates one tensor of their size, and a mask."""
        mask = logits > 0
        part = logits / self._factors
        torch.where(mask, part, logits.mul_(self._factors), out=logits)
        logits.clamp_(max=MAX_LOGIT)
        logits.sub_(torch.mul(self._frequency, self._counts, out=part))
        logits.sub_(torch.mul(self._presence, torch.gt(self._counts, 0, out=mask), out=part))
