from __future__ import annotations

import pytest

from kvstore.residency_journal import ResidencyJournal
from muxmesh.residency_format import ResidencyBatch, ResidencySnapshot, block_keys

A, B, C = (bytes([value]) * 16 for value in range(3))


def keys(*hashes: bytes, model: str = "m") -> tuple[int, ...]:
    return block_keys(model, hashes)


def test_batches_have_the_changes_since_the_one_before() -> None:
    journal = ResidencyJournal(7)
    assert journal.take_batch() is None
    journal.note("m", A, True)
    journal.note("m", B, True)
    assert journal.take_batch() == ResidencyBatch(7, 0, keys(A, B))
    journal.note("m", A, False)
    journal.note("n", A, True)
    assert journal.take_batch() == ResidencyBatch(7, 2, keys(A, model="n"), keys(A))
    assert journal.take_batch() is None


def test_of_several_changes_of_a_block_the_last_one_counts() -> None:
    journal = ResidencyJournal(7)
    for is_held in (True, False, True, False):
        journal.note("m", A, is_held)
    journal.note("m", B, False)
    journal.note("m", B, True)
    assert journal.take_batch() == ResidencyBatch(7, 0, keys(B), keys(A))


def test_a_snapshot_has_all_and_its_number_shows_the_changes_that_no_batch_has() -> None:
    journal = ResidencyJournal(7)
    journal.note("m", A, True)
    journal.take_batch()
    journal.note("m", B, True)
    journal.note("m", A, False)
    assert journal.take_snapshot([("m", (B, C)), ("n", ())]) == ResidencySnapshot(7, 3, keys(B, C))
    journal.note("m", C, False)
    assert journal.take_batch() == ResidencyBatch(7, 3, (), keys(C))


def test_without_changes_a_snapshot_leaves_no_gap() -> None:
    journal = ResidencyJournal(7)
    journal.note("m", A, True)
    batch = journal.take_batch()
    assert batch is not None and journal.take_snapshot([("m", (A,))]).number == batch.end == 1


def test_after_too_many_changes_only_a_snapshot_helps() -> None:
    journal = ResidencyJournal(7, max_changes=2)
    for one in (A, B, C):
        journal.note("m", one, True)
    assert journal.has_lost_changes
    with pytest.raises(AssertionError):
        journal.take_batch()
    journal.note("m", A, False)
    assert journal.take_snapshot([("m", (B, C))]) == ResidencySnapshot(7, 3, keys(B, C))
    assert not journal.has_lost_changes and journal.take_batch() is None


def test_the_first_change_after_none_is_announced() -> None:
    journal, announced = ResidencyJournal(7), list[int]()
    journal.on_change = lambda: announced.append(1)
    for one in (A, B):
        journal.note("m", one, True)
    assert len(announced) == 1
    journal.take_batch()
    journal.note("m", A, False)
    assert len(announced) == 2
