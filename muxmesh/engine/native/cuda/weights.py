"""The weights of a model on the device: one copy for all workers of the model, in memory that kvstore owns.

The first worker copies the weight image into the shared segment; the others wait for it and map the same bytes. A lock
on the weights page, a small memfd, decides who is first. It belongs to an open file description, so it ends with the
process that holds it: when a worker is killed while it copies, the next one copies again. Knows no attach protocol.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from muxmesh.clock import Clock
from muxmesh.device.torch_device import Event, TorchDevice, finished
from muxmesh.errors import DeviceError
from muxmesh.models.weight_image import ImageLayout, read_layout

_log = logging.getLogger(__name__)

CHUNK_BYTES = 16 << 20
"""Of each of the two staging buffers. At 50 GB/s a chunk takes 0.3 ms, so its fixed costs do not show."""
_WORD_BYTES = 8
_LOADED = 1


def image_tensors(layout: ImageLayout, memory: Tensor) -> dict[str, Tensor]:
    """Returns the tensors of a weight image by name, as views of ``memory``, which holds the bytes of the whole file.

    Matrices are [outputs, depth]. ``memory``: uint8, at least ``layout.num_bytes`` long, aligned to 256 bytes.
    """
    dtype: torch.dtype = getattr(torch, layout.dtype)
    return {name: memory[layout.bytes_of(name)].view(dtype).view(shape) for name, shape in layout.shapes.items()}


def load_weights(
    image: Path, segment: Tensor, page_fd: int, device: TorchDevice, clock: Clock, chunk_bytes: int = CHUNK_BYTES
) -> dict[str, Tensor]:
    """Returns the tensors of ``image`` in ``segment``, the model's shared memory (uint8) on ``device``.

    Copies them unless another worker has: the first word of the weights page ``page_fd`` is 1 when they are there.
    Blocks while another worker copies. Raises DeviceError if the segment is too small or the image is not complete.
    """
    layout = read_layout(image)
    if segment.numel() < layout.num_bytes:
        raise DeviceError(
            f"the device memory for weights has {segment.numel()} bytes; {image.name} has {layout.num_bytes}. The unit "
            "was started with another image: restart the mesh"
        )
    with _locked(page_fd) as page:
        if os.pread(page, _WORD_BYTES, 0) != _LOADED.to_bytes(_WORD_BYTES, "little"):
            started_at_s = clock.monotonic_s()
            with image.open("rb", buffering=0) as file, device.copying(), finished(device):
                _copy(file, segment[: layout.num_bytes], device, chunk_bytes)
            os.pwrite(page, _LOADED.to_bytes(_WORD_BYTES, "little"), 0)
            seconds = clock.monotonic_s() - started_at_s
            _log.info("copied %.0f MiB of weights to the device in %.2f s", layout.num_bytes / 2**20, seconds)
    return image_tensors(layout, segment)


@contextlib.contextmanager
def _locked(page_fd: int) -> Iterator[int]:
    """Holds the lock of the page; yields a file descriptor of it.

    Workers got theirs from kvstore and share its open file description, and with it a lock: so each opens the page
    anew.
    """
    own = os.open(f"/proc/self/fd/{page_fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(own, fcntl.LOCK_EX)
        yield own
    finally:
        os.close(own)


def _copy(file: BinaryIO, memory: Tensor, device: TorchDevice, chunk_bytes: int) -> None:
    """Copies the file to the device in chunks: one is read while the one before is copied."""
    staging = [device.staging(chunk_bytes) for _ in range(2)]
    copied: list[Event | None] = [None, None]
    for index, target in enumerate(torch.split(memory, chunk_bytes)):
        which = index % 2
        if (event := copied[which]) is not None:
            event.wait()
        source = staging[which][: target.numel()]
        _read_into(source.numpy().data, file)
        target.copy_(source, non_blocking=True)
        copied[which] = device.record()


def _read_into(buffer: memoryview, file: BinaryIO) -> None:
    """Fills ``buffer`` from ``file``. Raises DeviceError if the file ends before."""
    while buffer:
        num_bytes = os.readv(file.fileno(), [buffer])
        if num_bytes == 0:
            raise DeviceError(f"{file.name} ends before the size that it had; it was replaced while it was loaded")
        buffer = buffer[num_bytes:]
