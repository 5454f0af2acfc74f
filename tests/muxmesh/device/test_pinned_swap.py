"""Copies between a device and pages of the swap region, and what is pinned for them."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstore.device_memory import new_memfd
from muxmesh.cuda.driver import CudaDriver
from muxmesh.device.pinned_swap import PinnedSwap, Register
from muxmesh.device.torch_device import open_torch_device
from muxmesh.errors import DeviceError
from muxmesh.types import SWAP_PAGE_BYTES
from tests.support.fake_driver import fake_driver_library

PAGE = SWAP_PAGE_BYTES
CHUNK = 4 * PAGE
NUM_PAGES = 64
DEVICE = open_torch_device()


def new_swap(register: Register | None, num_pages: int = NUM_PAGES) -> PinnedSwap:
    fd = new_memfd("swap", num_pages * PAGE)
    try:
        return PinnedSwap(fd, DEVICE, register, CHUNK)
    finally:
        os.close(fd)


def random_bytes(size: int, seed: int = 1) -> torch.Tensor:
    data = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return torch.from_numpy(data).to(DEVICE.torch_device)


@given(
    pages=st.permutations(range(NUM_PAGES)),
    adjacent=st.integers(1, NUM_PAGES),
    sizes=st.lists(st.integers(1, 30 * PAGE), min_size=1, max_size=3),
)
def test_bytes_are_read_as_they_were_written_in_long_and_in_short_runs(
    pages: list[int], adjacent: int, sizes: list[int]
) -> None:
    runs = [list(range(first, min(first + adjacent, NUM_PAGES))) for first in pages if first % adjacent == 0]
    ordered, swap = [page for run in runs for page in run], new_swap(None)
    sizes = sizes if sum(sizes) <= NUM_PAGES * PAGE else sizes[:1]
    data = random_bytes(sum(sizes))
    target, source = swap.copy(ordered), swap.copy(ordered)
    for piece in torch.split(data, sizes):
        target.write(piece)
    source.skip(7)
    read = torch.cat([source.read(10), source.read(len(data) - 17)] if len(data) > 17 else [data[7:]])
    assert torch.equal(read, data[7:])


def test_only_chunks_that_are_used_are_pinned_and_each_once() -> None:
    registered: list[tuple[int, int]] = []
    swap = new_swap(lambda address, num_bytes: registered.append((address, num_bytes)), num_pages=18)
    swap.copy(range(9, 11)).write(random_bytes(2 * PAGE))
    base = registered[0][0] - 2 * CHUNK
    assert registered == [(base + 2 * CHUNK, CHUNK)]
    swap.copy(range(8, 18)).write(random_bytes(10 * PAGE))
    assert registered[1:] == [(base + 3 * CHUNK, CHUNK), (base + 4 * CHUNK, 2 * PAGE)], "the last chunk is shorter"
    swap.copy(range(8, 18)).read(10 * PAGE)
    assert len(registered) == 3


def test_no_copy_crosses_the_end_of_a_registration() -> None:
    swap = new_swap(None)
    ranges = [(PAGE, 10 * PAGE), (20 * PAGE, 21 * PAGE)]
    parts = [(first, end, part.numel()) for (first, end), part in swap._parts(ranges, random_bytes(10 * PAGE))]
    assert parts == [
        (PAGE, CHUNK, 3 * PAGE),
        (CHUNK, 2 * CHUNK, CHUNK),
        (2 * CHUNK, 10 * PAGE, 2 * PAGE),
        (20 * PAGE, 21 * PAGE, PAGE),
    ]


def test_short_runs_need_no_pinned_memory() -> None:
    registered: list[int] = []
    swap = new_swap(lambda address, _: registered.append(address))
    swap.copy((5, 3, 9)).write(random_bytes(3 * PAGE))
    assert torch.equal(swap.copy((5, 3, 9)).read(3 * PAGE), random_bytes(3 * PAGE)) and not registered


def test_memory_that_cannot_be_pinned_is_an_error_with_advice_and_is_tried_again() -> None:
    refusals = ["cuMemHostRegister_v2 failed: CUDA_ERROR_OUT_OF_MEMORY (2)"]

    def register(address: int, num_bytes: int) -> None:
        if refusals:
            raise DeviceError(refusals.pop())

    swap = new_swap(register)
    with pytest.raises(DeviceError, match=rf"cannot pin {CHUNK} bytes .*OUT_OF_MEMORY.*`ulimit -l`"):
        swap.copy((0,)).write(random_bytes(PAGE))
    swap.copy((0,)).write(random_bytes(PAGE))
    assert torch.equal(swap.copy((0,)).read(PAGE), random_bytes(PAGE))


@pytest.mark.skipif(not DEVICE.is_interpreted, reason="the driver of this process is not the fake one")
def test_the_driver_pins_each_chunk() -> None:
    driver = CudaDriver(fake_driver_library())
    driver.use_primary_context(0)
    addresses: list[int] = []

    def register(address: int, num_bytes: int) -> None:
        driver.register_host(address, num_bytes)
        addresses.append(address)

    new_swap(register).copy(range(2, 10)).write(random_bytes(8 * PAGE))
    assert len(addresses) == 3
    for address in addresses:
        driver.unregister_host(address)
        with pytest.raises(DeviceError, match="NOT_REGISTERED"):
            driver.unregister_host(address)
