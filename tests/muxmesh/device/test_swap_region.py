"""Copies over scattered pages."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.device_memory import new_memfd
from muxmesh.device.swap_region import SwapCopy, SwapRegion, _runs
from muxmesh.types import SWAP_PAGE_BYTES


def region(num_pages: int) -> np.ndarray:
    """A region in which each byte is its page's number."""
    return np.repeat(np.arange(num_pages, dtype=np.uint8), SWAP_PAGE_BYTES)


def random_bytes(num_bytes: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(100, 256, num_bytes, dtype=np.uint8)


def test_a_copy_is_written_to_its_pages_in_their_order() -> None:
    memory, data = region(6), random_bytes(2 * SWAP_PAGE_BYTES + 10)
    SwapCopy(memory, (4, 1, 3)).write(data)
    for index, page in enumerate((4, 1)):
        expected = data[index * SWAP_PAGE_BYTES : (index + 1) * SWAP_PAGE_BYTES]
        assert np.array_equal(memory[page * SWAP_PAGE_BYTES : (page + 1) * SWAP_PAGE_BYTES], expected)
    assert np.array_equal(memory[3 * SWAP_PAGE_BYTES : 3 * SWAP_PAGE_BYTES + 10], data[-10:])


def test_nothing_outside_of_a_copy_is_written() -> None:
    memory, untouched = region(5), region(5)
    SwapCopy(memory, (3, 1)).write(random_bytes(SWAP_PAGE_BYTES + 7))
    written = np.zeros(len(memory), dtype=bool)
    written[3 * SWAP_PAGE_BYTES : 4 * SWAP_PAGE_BYTES] = True
    written[SWAP_PAGE_BYTES : SWAP_PAGE_BYTES + 7] = True
    assert np.array_equal(memory[~written], untouched[~written])
    assert not np.any(memory[written] == untouched[written])


@given(
    sizes=st.lists(st.integers(0, 2 * SWAP_PAGE_BYTES), min_size=1, max_size=6),
    read_sizes=st.lists(st.integers(1, SWAP_PAGE_BYTES), min_size=1, max_size=4),
    seed=st.integers(0, 5),
)
def test_bytes_are_read_as_they_were_written_however_they_are_cut(
    sizes: list[int], read_sizes: list[int], seed: int
) -> None:
    data = random_bytes(sum(sizes), seed)
    num_pages = -(-len(data) // SWAP_PAGE_BYTES)
    memory = region(num_pages + 2)
    pages = np.random.default_rng(seed).permutation(num_pages + 2)[:num_pages].tolist()
    sink, done = SwapCopy(memory, pages), 0
    for size in sizes:
        sink.write(data[done : done + size])
        done += size
    source, read = SwapCopy(memory, pages), np.zeros_like(data)
    done = 0
    while done < len(data):
        size = min(read_sizes[done % len(read_sizes)], len(data) - done)
        source.read_into(read[done : done + size])
        done += size
    assert np.array_equal(read, data)


@pytest.mark.parametrize("num_skipped", [0, 5, SWAP_PAGE_BYTES, SWAP_PAGE_BYTES + 1])
def test_skipped_bytes_are_not_read(num_skipped: int) -> None:
    memory, data, pages = region(4), random_bytes(2 * SWAP_PAGE_BYTES), (2, 0)
    SwapCopy(memory, pages).write(data)
    source, rest = SwapCopy(memory, pages), np.zeros(10, dtype=np.uint8)
    source.skip(num_skipped)
    source.read_into(rest)
    assert np.array_equal(rest, data[num_skipped : num_skipped + 10])


def test_pieces_of_other_types_and_shapes_are_copied_as_bytes() -> None:
    memory, numbers = region(2), np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    SwapCopy(memory, (1,)).write(numbers)
    read = np.empty_like(numbers)
    SwapCopy(memory, (1,)).read_into(read)
    assert np.array_equal(read, numbers)


@pytest.mark.parametrize(
    ("pages", "runs"),
    [
        ((), []),
        ((3,), [(3, 4)]),
        ((3, 4, 5), [(3, 6)]),
        ((5, 4, 3), [(5, 6), (4, 5), (3, 4)]),
        ((0, 1, 7, 8, 2), [(0, 2), (7, 9), (2, 3)]),
    ],
)
def test_consecutive_pages_are_one_run(pages: tuple[int, ...], runs: list[tuple[int, int]]) -> None:
    assert list(_runs(pages)) == [(first * SWAP_PAGE_BYTES, end * SWAP_PAGE_BYTES) for first, end in runs]


def test_mappings_of_one_region_see_each_others_copies() -> None:
    fd = new_memfd("swap", 3 * SWAP_PAGE_BYTES)
    one, other = SwapRegion(fd), SwapRegion(fd)
    os.close(fd)
    data, read = random_bytes(SWAP_PAGE_BYTES + 1), np.zeros(SWAP_PAGE_BYTES + 1, dtype=np.uint8)
    one.copy((2, 0)).write(data)
    other.copy((2, 0)).read_into(read)
    assert np.array_equal(read, data)
