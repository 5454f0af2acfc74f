"""The memory in which one process times steps: a pool of its own, and on a GPU its own copy of the weights.

The pool holds random numbers, as if KV had been computed: pages that were never written are all the kernel's zero page,
which stays in the caches, and a NaN would fail its sequence.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from muxmesh.config.model_config import ModelConfig
from muxmesh.config.runtime import PreparedModel
from muxmesh.config.schema import UnitConfig
from muxmesh.device.device_pool import HostPool
from muxmesh.models.model_spec import KvShape
from muxmesh.types import blocks_for

if TYPE_CHECKING:  # only units on a GPU load torch
    from muxmesh.device.cuda_mapping import MappedWeights
    from muxmesh.device.cuda_pool import CudaPool
    from muxmesh.device.torch_device import TorchDevice

_TILE = 1 << 20
"""Different random numbers, which repeat over the pool."""


class HostTimerMemory:
    """A pool in host memory, of which only what measurements use takes memory of the machine."""

    def __init__(self, unit: UnitConfig) -> None:
        self._slab_bytes = unit.slab
        self._elements = np.zeros(unit.kv_pool // unit.slab * (unit.slab // 4), dtype=np.float32)
        self._num_filled = 0
        self.pool = HostPool(self._elements, unit.slab, None)

    def fill(self, shape: KvShape, num_blocks: int) -> bool:
        """Writes random numbers into the token blocks [0, ``num_blocks``). False if that has been done before."""
        slabs = blocks_for(num_blocks, self._slab_bytes // shape.token_block_bytes)
        end = slabs * (self._slab_bytes // 4)
        if end <= self._num_filled:
            return False
        tile = np.random.default_rng(0).standard_normal(_TILE, dtype=np.float32)
        while self._num_filled < end:
            part = self._elements[self._num_filled : min(end, self._num_filled + _TILE)]
            part[:] = tile[: len(part)]
            self._num_filled += len(part)
        return True


def cuda_timer_memory(
    unit: UnitConfig, config: ModelConfig, prepared: PreparedModel, shape: KvShape, device: TorchDevice
) -> tuple[CudaPool, MappedWeights | None]:
    """Allocates a filled pool on a GPU, and memory for the model's weights. Raises DeviceError if it has too little."""
    from muxmesh.device.cuda_mapping import MappedWeights  # noqa: PLC0415 - only units on a GPU need torch
    from muxmesh.device.cuda_pool import CudaPool, kv_dtype  # noqa: PLC0415
    from muxmesh.device.torch_device import device_bytes  # noqa: PLC0415

    pool = CudaPool(device_bytes(device, unit.kv_pool // unit.slab * unit.slab), unit.slab, None, device)
    if prepared.image is None:
        return pool, None
    pool.elements(kv_dtype(shape)).normal_()
    weights = device_bytes(device, prepared.image.stat().st_size)
    return pool, MappedWeights(weights, os.memfd_create("muxmesh-weights-page", os.MFD_CLOEXEC))
