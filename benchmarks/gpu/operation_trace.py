"""The first operation of torch whose values are not finite, or differ from those of another process.

Triton kernels are no operations of torch; what they write is seen as an input of the next operation.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_UNWRITTEN = ("empty", "new_empty", "set_")
"""Beginnings of the names of operations whose memory may hold anything. Triton's interpreter uses `set_`."""


@dataclass(frozen=True, slots=True)
class TracedTensor:
    """A tensor of floats that an operation read or wrote: `mm in1 [1024, 64]`; ``norm`` is NaN if it is not finite."""

    name: str
    norm: float

    @property
    def is_finite(self) -> bool:
        return abs(self.norm) < float("inf")


class OperationTrace(TorchDispatchMode):
    """While the block runs, takes the norm of every tensor of floats that torch reads and writes, on its stream."""

    def __init__(self) -> None:
        super().__init__()
        self._names: list[str] = []
        self._norms: list[Tensor] = []
        self.logits: Tensor | None = None
        """What the last copy to f32 wrote: in a step, its logits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        if func.is_view or name.startswith(_UNWRITTEN):
            return func(*args, **(kwargs or {}))
        for number, tensor in enumerate(args):
            if number or not name.startswith("copy_"):  # the target of a copy need not be written yet
                self._take(f"{name} in{number}", tensor)
        result = func(*args, **(kwargs or {}))
        for number, tensor in enumerate(result if isinstance(result, tuple | list) else (result,)):
            if self._take(f"{name} out{number}", tensor) and name == "copy_" and tensor.dtype == torch.float32:
                self.logits = tensor
        return result

    def tensors(self) -> list[TracedTensor]:
        """All of them, in order. Waits for the device."""
        norms = torch.stack(self._norms).tolist() if self._norms else []
        return [TracedTensor(name, norm) for name, norm in zip(self._names, norms, strict=True)]

    def _take(self, name: str, value: object) -> bool:
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
            return False
        self._names.append(f"{name} {list(value.shape)}")
        self._norms.append(torch.linalg.vector_norm(value, dtype=torch.float64))
        return True


def first_not_finite(tensors: Sequence[TracedTensor]) -> int | None:
    """Index of the first tensor that is not finite."""
    return next((at for at, one in enumerate(tensors) if not one.is_finite), None)


def first_difference(tensors: Sequence[TracedTensor], expected: Sequence[TracedTensor], most: float) -> int | None:
    """Index of the first tensor whose norm differs by more than the part ``most``, or which is another tensor."""
    for at, (one, other) in enumerate(zip(tensors, expected, strict=False)):
        is_close = one.is_finite and abs(one.norm - other.norm) <= most * abs(other.norm)
        if one.name != other.name or not is_close:
            return at
    return None if len(tensors) == len(expected) else min(len(tensors), len(expected))
