"""The pool on a device, beyond what it has in common with the pool in host memory."""

import os

import numpy as np
import pytest
import torch

from kvstore.device_memory import new_memfd
from muxmesh.cuda.driver import CudaDriver
from muxmesh.device.cuda_pool import CudaPool, kv_dtype
from muxmesh.device.device_pool import KvCopy
from muxmesh.device.kv_codec import GROUP_TOKENS, encoded_bytes
from muxmesh.device.kv_view import KvGeometry
from muxmesh.device.pinned_swap import PinnedSwap
from muxmesh.device.torch_device import InterpretedDevice, open_torch_device
from muxmesh.errors import DeviceError, DeviceLost
from muxmesh.models.model_spec import KvShape
from muxmesh.types import SWAP_PAGE_BYTES, KvFormat, blocks_for
from tests.support.refusing_device import RefusingDevice

BF16 = KvShape(2, 2, 64, 16, 2, is_bfloat16=True)
F16 = KvShape(2, 2, 64, 16, 2)
F32 = KvShape(2, 2, 64, 16, 4)
NUM_TOKENS = 2 * GROUP_TOKENS + 37
DEVICE = open_torch_device()
_kept: list[CudaPool] = []
"""Pinned memory stays pinned, so its addresses must not be mapped again."""


def new_pool(shape: KvShape, slab_bytes: int, num_blocks: int = 60) -> CudaPool:
    """A pool of random KV with a swap region of the same size."""
    per_slab = slab_bytes // shape.token_block_bytes
    num_bytes = blocks_for(num_blocks, per_slab) * slab_bytes
    memory = torch.empty(num_bytes, dtype=torch.uint8, device=DEVICE.torch_device)
    fd = new_memfd("swap", blocks_for(num_bytes, SWAP_PAGE_BYTES) * SWAP_PAGE_BYTES)
    pool = CudaPool(memory, slab_bytes, PinnedSwap(fd, DEVICE, None if DEVICE.is_interpreted else register), DEVICE)
    os.close(fd)
    _kept.append(pool)
    elements = pool.elements(kv_dtype(shape))
    elements.copy_(torch.from_numpy(np.random.default_rng(2).standard_normal(elements.numel())))
    return pool


def register(address: int, num_bytes: int) -> None:
    driver = CudaDriver()
    driver.use_primary_context(0)
    driver.register_host(address, num_bytes)


def contents(pool: CudaPool, shape: KvShape, slab_bytes: int, block_ids: tuple[int, ...]) -> torch.Tensor:
    """[blocks, layers * heads, K and V, block_size, head_dim], a copy."""
    elements, size = pool.elements(kv_dtype(shape)), shape.token_block_bytes // shape.dtype_bytes
    offsets = KvGeometry(shape, slab_bytes).block_offsets(block_ids)
    blocks = torch.stack([elements[offset : offset + size] for offset in offsets.tolist()])
    return blocks.view(len(block_ids), -1, 2, shape.block_size, shape.head_dim).cpu()


def scattered(count: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).permutation(60)[:count].tolist())


@pytest.mark.parametrize("shape", [BF16, F16, F32])
@pytest.mark.parametrize("rest", [0, 8, 6, 64])
@pytest.mark.parametrize("kv_format", ["raw", "int8"])
def test_a_sequence_is_restored_in_other_blocks(shape: KvShape, rest: int, kv_format: KvFormat) -> None:
    """``rest``: bytes of a slab behind its last token block."""
    slab_bytes = 4 * shape.token_block_bytes + rest
    pool, count = new_pool(shape, slab_bytes), blocks_for(NUM_TOKENS, shape.block_size)
    before, after = scattered(count, 3), scattered(count, 4)
    expected = contents(pool, shape, slab_bytes, before)
    pages = blocks_for(encoded_bytes(shape, NUM_TOKENS, kv_format), SWAP_PAGE_BYTES)
    copy = KvCopy(NUM_TOKENS, kv_format, tuple(range(pages)))
    assert pool.copy_out(shape, before, copy) == encoded_bytes(shape, NUM_TOKENS, kv_format)
    pool.copy_in(shape, after, copy, 0)
    restored = contents(pool, shape, slab_bytes, after)
    if kv_format == "raw":
        assert torch.equal(restored.view(torch.uint8), expected.view(torch.uint8))
    else:
        tokens = NUM_TOKENS // shape.block_size  # whole blocks
        assert (restored[:tokens].float() - expected[:tokens].float()).abs().max() < 0.04


def test_cached_blocks_in_the_middle_of_a_group_are_left_as_they_are() -> None:
    slab_bytes = 4 * BF16.token_block_bytes
    pool, count = new_pool(BF16, slab_bytes), blocks_for(NUM_TOKENS, 16)
    before, after = scattered(count, 3), scattered(count, 4)
    expected = contents(pool, BF16, slab_bytes, before)
    pages = blocks_for(encoded_bytes(BF16, NUM_TOKENS, "int8"), SWAP_PAGE_BYTES)
    copy = KvCopy(NUM_TOKENS, "int8", tuple(range(pages)))
    pool.copy_out(BF16, before, copy)
    untouched = contents(pool, BF16, slab_bytes, after)
    pool.copy_in(BF16, after, copy, 11)  # a whole group of 8 blocks, and 3 of the next
    restored = contents(pool, BF16, slab_bytes, after)
    assert torch.equal(restored[:11], untouched[:11])
    assert (restored[11:-1].float() - expected[11:-1].float()).abs().max() < 0.04


def test_the_pool_as_elements_is_the_same_memory() -> None:
    pool = new_pool(BF16, 4 * BF16.token_block_bytes)
    elements = pool.elements(torch.bfloat16)
    elements[5] = 3.5
    assert pool.elements(torch.uint8)[10:12].view(torch.bfloat16).item() == 3.5
    assert elements.numel() * 2 == pool.elements(torch.uint8).numel()


def test_int8_of_16_bit_kv_takes_little_more_than_half_of_its_bytes() -> None:
    assert encoded_bytes(BF16, 2048, "int8") < 0.6 * encoded_bytes(BF16, 2048, "raw")


class FailingDevice(InterpretedDevice):
    """Refuses uploads with ``error``."""

    def __init__(self, error: RuntimeError) -> None:
        super().__init__()
        self._error = error

    def upload(self, array: np.ndarray) -> torch.Tensor:
        raise self._error


@pytest.mark.skipif(not DEVICE.is_interpreted, reason="kernels are compiled in this process")
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32 MiB"), DeviceError),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), DeviceLost),
    ],
)
@pytest.mark.parametrize("direction", ["to", "from"])
def test_errors_of_the_device_are_those_of_the_mesh(
    error: RuntimeError, expected: type[DeviceError], direction: str
) -> None:
    swap_fd, device = new_memfd("swap", 64 * SWAP_PAGE_BYTES), FailingDevice(error)
    pool = CudaPool(torch.empty(1 << 20, dtype=torch.uint8), 1 << 20, PinnedSwap(swap_fd, device, None), device)
    os.close(swap_fd)
    copy = KvCopy(16, "raw", tuple(range(8)))
    with pytest.raises(expected, match=f"copying KV {direction} the swap region: CUDA") as raised:
        if direction == "to":
            pool.copy_out(F32, (0,), copy)
        else:
            pool.copy_in(F32, (0,), copy, 0)
    assert type(raised.value) is expected


@pytest.mark.skipif(not DEVICE.is_interpreted, reason="kernels are compiled in this process")
def test_when_a_copy_raises_the_device_has_finished_what_was_enqueued_of_it() -> None:
    swap_fd, device = new_memfd("swap", 64 * SWAP_PAGE_BYTES), RefusingDevice()
    pool = CudaPool(torch.zeros(1 << 20, dtype=torch.uint8), 1 << 20, PinnedSwap(swap_fd, device, None), device)
    os.close(swap_fd)
    copy = KvCopy(16, "raw", tuple(range(1, 30, 2)))  # short runs of pages, which the host arranges
    pool.copy_out(F32, (0,), copy)
    device.refused = "download"
    with pytest.raises(DeviceError):
        pool.copy_out(F32, (0,), copy)
    assert device.calls == ["waited", "refused", "waited"], (
        "pages and blocks may be used for something else from now on"
    )
    device.refused = "upload"
    with pytest.raises(DeviceError):
        pool.copy_in(F32, (0,), copy, 0)
    assert device.calls[3:] == ["refused", "waited"]
