"""A memfd as a tensor of torch, in place of device memory that several processes share."""

from __future__ import annotations

import mmap
import os

import torch
from torch import Tensor


def new_shared(num_bytes: int) -> int:
    """Returns the file descriptor of new shared memory, all zeros."""
    fd = os.memfd_create("test-segment", os.MFD_CLOEXEC)
    os.ftruncate(fd, num_bytes)
    return fd


def mapped_tensor(fd: int) -> Tensor:
    """Maps all of ``fd`` as a uint8 tensor. Writes are seen by every process that maps it."""
    return torch.frombuffer(mmap.mmap(fd, os.fstat(fd).st_size), dtype=torch.uint8)
