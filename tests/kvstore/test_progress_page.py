"""The page in which a worker records how far its leases are computed."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.progress_page import ProgressPage, new_progress_fd, page_bytes
from kvstore.sequence_progress import SequenceProgress
from muxmesh.block_hashes import HASH_BYTES, block_hashes

NUM_SLOTS, MAX_BLOCKS = 2, 6
HASHES = block_hashes(range(16 * 8), 16, b"root")


@pytest.fixture
def pages() -> Iterator[tuple[ProgressPage, ProgressPage]]:
    """The worker's and kvstore's mapping of the same page."""
    fd = new_progress_fd(NUM_SLOTS, MAX_BLOCKS)
    both = ProgressPage(fd, NUM_SLOTS, MAX_BLOCKS), ProgressPage(fd, NUM_SLOTS, MAX_BLOCKS)
    os.close(fd)
    yield both
    for page in both:
        page.close()


def test_kvstore_reads_what_the_worker_committed(pages: tuple[ProgressPage, ProgressPage]) -> None:
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


def test_kvstore_reads_the_remaining_work_and_who_is_in_the_batch(pages: tuple[ProgressPage, ProgressPage]) -> None:
    worker, unit = pages
    assert unit.reports() == {}
    worker.begin(7)
    worker.begin(8)
    assert unit.reports()[7] == SequenceProgress(True, None, 0.0)
    worker.report(7, SequenceProgress(False, 2.5, 0.75, True, 5))
    worker.report(9, SequenceProgress(False, 1.0, 1.0))  # has no slot
    assert unit.reports() == {7: SequenceProgress(False, 2.5, 0.75, True, 5), 8: SequenceProgress(True, None, 0.0)}
    worker.end(7)
    worker.begin(10)
    assert unit.reports()[10] == SequenceProgress(True, None, 0.0), "nothing is left of the slot's last sequence"


def test_a_report_and_the_hashes_do_not_overwrite_each_other(pages: tuple[ProgressPage, ProgressPage]) -> None:
    worker, unit = pages
    worker.begin(7)
    worker.begin(8)
    for lease_id in (7, 8):
        worker.commit(lease_id, 0, HASHES[:MAX_BLOCKS])
        worker.report(lease_id, SequenceProgress(False, float(lease_id), 1.0))
    assert unit.read() == {7: HASHES[:MAX_BLOCKS], 8: HASHES[:MAX_BLOCKS]}
    assert unit.reports() == {one: SequenceProgress(False, float(one), 1.0) for one in (7, 8)}


def test_a_slot_begins_empty_for_its_next_lease(pages: tuple[ProgressPage, ProgressPage]) -> None:
    worker, unit = pages
    worker.begin(7)
    worker.commit(7, 0, HASHES[:4])
    worker.end(7)
    worker.begin(9)
    assert unit.read() == {9: ()}


def test_a_lease_that_starts_again_at_an_earlier_block_has_fewer_computed_blocks(
    pages: tuple[ProgressPage, ProgressPage],
) -> None:
    worker, unit = pages
    worker.begin(7)
    worker.commit(7, 0, HASHES[:4])
    worker.commit(7, 1, HASHES[5:6])
    assert unit.read() == {7: (HASHES[0], HASHES[5])}


def test_leases_and_blocks_past_the_size_of_the_page_are_not_recorded(
    pages: tuple[ProgressPage, ProgressPage],
) -> None:
    worker, unit = pages
    for lease_id in (1, 2, 3):
        worker.begin(lease_id)
        worker.commit(lease_id, 0, HASHES)
    assert unit.read() == {1: HASHES[:MAX_BLOCKS], 2: HASHES[:MAX_BLOCKS]}
    worker.end(3)
    assert set(unit.read()) == {1, 2}


def test_the_slot_of_an_ended_lease_is_used_again(pages: tuple[ProgressPage, ProgressPage]) -> None:
    worker, unit = pages
    for lease_id in (1, 2):
        worker.begin(lease_id)
    worker.end(1)
    worker.begin(3)
    worker.commit(3, 0, HASHES[:1])
    assert unit.read() == {2: (), 3: HASHES[:1]}


def test_lease_ids_of_64_bits_are_kept(pages: tuple[ProgressPage, ProgressPage]) -> None:
    worker, unit = pages
    worker.begin(2**64 - 1)
    assert unit.read() == {2**64 - 1: ()}


def test_the_size_of_a_page_holds_all_slots() -> None:
    fd = new_progress_fd(NUM_SLOTS, MAX_BLOCKS)
    assert os.fstat(fd).st_size == page_bytes(NUM_SLOTS, MAX_BLOCKS) == NUM_SLOTS * (40 + MAX_BLOCKS * HASH_BYTES)
    os.close(fd)


@given(
    st.lists(
        st.tuples(st.sampled_from(["begin", "commit", "end"]), st.integers(1, 4), st.integers(0, MAX_BLOCKS)),
        max_size=30,
    )
)
def test_the_page_equals_a_dictionary_over_random_operations(operations: list[tuple[str, int, int]]) -> None:
    fd = new_progress_fd(NUM_SLOTS, MAX_BLOCKS)
    worker, unit = (ProgressPage(fd, NUM_SLOTS, MAX_BLOCKS) for _ in range(2))
    os.close(fd)
    expected: dict[int, tuple[bytes, ...]] = {}
    for operation, lease_id, count in operations:
        if operation == "begin" and lease_id not in expected:
            worker.begin(lease_id)
            if len(expected) < NUM_SLOTS:
                expected[lease_id] = ()
        elif operation == "commit":
            first = min(count, len(expected.get(lease_id, ())))
            worker.commit(lease_id, first, HASHES[first : first + count])
            if lease_id in expected:
                expected[lease_id] = (expected[lease_id][:first] + HASHES[first : first + count])[:MAX_BLOCKS]
        elif operation == "end":
            worker.end(lease_id)
            expected.pop(lease_id, None)
        assert unit.read() == expected
    worker.close()
    unit.close()
