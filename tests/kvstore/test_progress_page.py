"""The page in which a worker says how far its leases are computed."""

import os
from collections.abc import Iterator

import pytest

from kvstore.progress_page import ProgressPage, new_progress_fd
from muxmesh.block_hashes import block_hashes

HASHES = block_hashes(range(16 * 8), 16, b"root")


@pytest.fixture
def pages() -> Iterator[tuple[ProgressPage, ProgressPage]]:
    """The worker's and the unit's view of the same page."""
    fd = new_progress_fd(2, 6)
    both = ProgressPage(fd, 2, 6), ProgressPage(fd, 2, 6)
    os.close(fd)
    yield both
    for page in both:
        page.close()


def test_what_one_side_commits_the_other_reads(pages: tuple[ProgressPage, ProgressPage]) -> None:
    worker, unit = pages
    worker.begin(7)
    assert unit.read() == {7: ()}
    worker.commit(7, 0, HASHES[:2])
    worker.commit(7, 2, HASHES[2:3])
    worker.begin(8)
    worker.commit(8, 0, HASHES[4:5])
    assert unit.read() == {7: HASHES[:3], 8: HASHES[4:5]}
    worker.end(7)
    assert unit.read() == {8: HASHES[4:5]}


def test_a_slot_begins_empty_for_its_next_lease(pages: tuple[ProgressPage, ProgressPage]) -> None:
    worker, unit = pages
    worker.begin(7)
    worker.commit(7, 0, HASHES[:4])
    worker.end(7)
    worker.begin(9)
    assert unit.read() == {9: ()}


def test_more_leases_or_blocks_than_there_is_room_for_are_not_kept(pages: tuple[ProgressPage, ProgressPage]) -> None:
    worker, unit = pages
    for lease_id in (1, 2, 3):
        worker.begin(lease_id)
        worker.commit(lease_id, 0, HASHES)
    assert unit.read() == {1: HASHES[:6], 2: HASHES[:6]}
    worker.end(3)
    assert set(unit.read()) == {1, 2}
