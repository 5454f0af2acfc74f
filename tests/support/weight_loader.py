"""A process that loads a weight image into shared memory, as a worker does: `python -m tests.support.weight_loader`.

Arguments: IMAGE SEGMENT_FD PAGE_FD CHUNK_BYTES STOP_AFTER. Prints the number of each point that it records, and
waits for a line on standard input after chunk STOP_AFTER (0: never). At last prints the sum of the tensor `norm`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from muxmesh.clock import SystemClock
from muxmesh.device.torch_device import Event, InterpretedDevice
from muxmesh.engine.native.cuda.weights import load_weights
from tests.support.shared_memory import mapped_tensor


class ReportingDevice(InterpretedDevice):
    """Reports each point that the loader records: one after each copy, and one at the end."""

    def __init__(self, stop_after: int) -> None:
        super().__init__()
        self._stop_after, self._num_recorded = stop_after, 0

    def record(self) -> Event:
        self._num_recorded += 1
        print(f"recorded {self._num_recorded}", flush=True)
        if self._num_recorded == self._stop_after:
            sys.stdin.readline()
        return super().record()


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    image, segment_fd, page_fd, chunk_bytes, stop_after = sys.argv[1], *map(int, sys.argv[2:])
    segment = mapped_tensor(segment_fd)
    weights = load_weights(Path(image), segment, page_fd, ReportingDevice(stop_after), SystemClock(), chunk_bytes)
    print(f"norm {weights['norm'].to(torch.float32).sum().item()}", flush=True)


if __name__ == "__main__":
    main()
