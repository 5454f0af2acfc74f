"""Bias, masks and penalties applied to logits on the device.

The arithmetic is that of `muxmesh.engine.token_sampler`, rounded at the same points.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from muxmesh.device.torch_device import TorchDevice
from muxmesh.engine.native.cuda.device_rows import upload
from muxmesh.engine.native.cuda.sampling_plan import WORD_BITS, LogitEdits

MAX_LOGIT = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class DeviceEdits:
    """`LogitEdits` on the device; same fields."""

    bias_at: Tensor
    bias: Tensor
    masked: Tensor
    masks: Tensor
    penalized_at: Tensor
    factors: Tensor
    counted_at: Tensor
    costs: Tensor
    counts: Tensor
    rates: Tensor

    @classmethod
    def upload(cls, edits: LogitEdits, device: TorchDevice) -> DeviceEdits:
        """Enqueues the upload, as one transfer."""
        return cls(**upload(device, {field.name: getattr(edits, field.name) for field in fields(cls)}))

    def bias_and_mask(self, logits: Tensor) -> None:
        """Adds bias and applies masks to ``logits`` (f32 [samples, vocabulary]) in place."""
        if self.bias.numel():
            at = tuple(self.bias_at)
            logits[at] = logits[at] + self.bias
        if self.masked.numel():
            logits[self.masked] = torch.where(self._is_allowed(logits.shape[1]), logits[self.masked], -torch.inf)

    def penalize(self, logits: Tensor) -> None:
        """Then applies the penalties for the tokens before the step."""
        if self.factors.numel():
            at = tuple(self.penalized_at)
            values = logits[at]
            changed = torch.where(values > 0, values / self.factors, values * self.factors)
            # A tiny factor overflows. What is -inf stays so: a banned token.
            logits[at] = changed.clamp(max=MAX_LOGIT)
        if self.costs.numel():
            at = tuple(self.counted_at)
            # Two subtractions, each rounded, as on the CPU.
            logits[at] = (logits[at] - self.costs[0]) - self.costs[1]

    def _is_allowed(self, vocab_size: int) -> Tensor:
        """Which tokens the masks allow (bool [masked, vocabulary])."""
        shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=self.masks.device)
        bits = (self.masks[:, :, None] >> shifts) & 1
        return bits.reshape(len(self.masks), -1)[:, :vocab_size].bool()
