"""A device whose memory is full at a point in a test, which notes what it is asked for after that."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from muxmesh.device.torch_device import Event, InterpretedDevice


class RefusingDevice(InterpretedDevice):
    """Refuses the method ``refused`` (`upload` or `download`). ``calls``: refusals and waits, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.refused = ""
        self.calls: list[str] = []

    def upload(self, array: np.ndarray) -> Tensor:
        self._check("upload")
        return super().upload(array)

    def download(self, tensor: Tensor) -> Callable[[], np.ndarray]:
        self._check("download")
        return super().download(tensor)

    def record(self) -> Event:
        return _NotedEvent(self.calls)

    def _check(self, name: str) -> None:
        if name == self.refused:
            self.calls.append("refused")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class _NotedEvent:
    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def wait(self) -> None:
        self._calls.append("waited")
