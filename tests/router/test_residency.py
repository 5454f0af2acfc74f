"""The index of residency, and its histories against units whose caches are sets."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.residency_journal import ResidencyJournal
from muxmesh.residency_format import ResidencyBatch, ResidencySnapshot, block_keys
from router.residency import ResidencyIndex


def index_of(**held: tuple[int, ...]) -> ResidencyIndex:
    index = ResidencyIndex()
    for unit, keys in held.items():
        index.load(unit, ResidencySnapshot(1, 0, keys))
    return index


def test_a_prompt_matches_as_far_as_a_unit_holds_its_blocks_without_a_gap() -> None:
    index = index_of(a=(1, 2, 3), b=(1, 3, 4), c=(9,))
    assert index.match((1, 2, 3, 4)) == {"a": 3, "b": 1}
    assert index.match((1,)) == {"a": 1, "b": 1}
    assert index.match((9, 1)) == {"c": 1}
    assert index.match(()) == index.match((5, 1)) == {}


def test_batches_change_what_a_unit_holds() -> None:
    index = index_of(a=(1, 2), b=(1,))
    assert index.apply("a", ResidencyBatch(1, 0, (3,), (1,)))
    assert index.match((1, 2)) == {"b": 1} and index.match((3,)) == {"a": 1}
    assert (index.num_blocks("a"), len(index)) == (2, 3)


def test_a_gap_another_incarnation_and_an_unknown_unit_need_a_snapshot() -> None:
    index = index_of(a=(1,))
    for unit, batch in (
        ("a", ResidencyBatch(1, 1, (2,))),
        ("a", ResidencyBatch(2, 0, (2,))),
        ("b", ResidencyBatch(1, 0, (2,))),
    ):
        assert not index.apply(unit, batch)
    assert index.match((2,)) == {} and index.match((1,)) == {"a": 1}


def test_a_batch_that_the_snapshot_has_already_changes_nothing() -> None:
    index = ResidencyIndex()
    index.load("a", ResidencySnapshot(1, 5, (1,)))
    assert index.apply("a", ResidencyBatch(1, 3, (), (1, 2)))
    assert not index.apply("a", ResidencyBatch(1, 4, (7, 8))), "a part of it is known"
    assert index.match((1,)) == {"a": 1}


def test_a_dropped_unit_holds_nothing_and_the_others_hold_what_they_held() -> None:
    index = index_of(a=(1, 2), b=(2, 3))
    index.drop("a")
    index.drop("x")
    assert not index.is_known("a") and index.match((2, 3)) == {"b": 2} and index.match((1,)) == {}
    index.drop_all()
    assert len(index) == 0 and not index.is_known("b")


def test_memory_is_bounded() -> None:
    index = ResidencyIndex(max_keys=3)
    index.load("a", ResidencySnapshot(1, 0, (1, 2, 3, 4, 5)))
    index.load("b", ResidencySnapshot(1, 0, (1, 6)))
    assert len(index) == 3
    assert index.match((1, 2, 3, 4)) == {"a": 3, "b": 1}, "keys that are kept have all of their holders"
    assert index.apply("a", ResidencyBatch(1, 0, (7,), (2, 4))) and index.match((7,)) == {}
    assert index.apply("a", ResidencyBatch(1, 3, (7,))) and index.match((7,)) == {"a": 1}, "there is a free entry again"


HASHES = [bytes([value]) * 16 for value in range(6)]


@dataclass
class Unit:
    """A unit whose prefix cache is a set, and the batches that its reader has not read."""

    journal: ResidencyJournal
    held: set[bytes] = field(default_factory=set)
    stream: list[ResidencyBatch] = field(default_factory=list)
    snapshot: ResidencySnapshot = field(default_factory=lambda: ResidencySnapshot(0, 0))


class Histories(RuleBasedStateMachine):
    """Random changes, batches, lost batches, snapshots and restarts: what was read is what the units hold."""

    def __init__(self) -> None:
        super().__init__()
        self.index = ResidencyIndex()
        self.num_incarnations = 0
        self.units = {name: Unit(self._journal()) for name in "ab"}

    def _journal(self) -> ResidencyJournal:
        self.num_incarnations += 1
        return ResidencyJournal(self.num_incarnations, max_changes=4)

    @rule(unit=st.sampled_from("ab"), block_hash=st.sampled_from(HASHES))
    def change(self, unit: str, block_hash: bytes) -> None:
        one = self.units[unit]
        one.held ^= {block_hash}
        one.journal.note("m", block_hash, block_hash in one.held)

    @rule(unit=st.sampled_from("ab"), is_lost=st.booleans())
    def publish(self, unit: str, is_lost: bool) -> None:
        """A batch, which may be trimmed before it is read."""
        one = self.units[unit]
        if one.journal.has_lost_changes:
            self.publish_snapshot(unit)
        elif (batch := one.journal.take_batch()) is not None and not is_lost:
            one.stream.append(batch)

    @rule(unit=st.sampled_from("ab"))
    def publish_snapshot(self, unit: str) -> None:
        one = self.units[unit]
        one.snapshot = one.journal.take_snapshot([("m", tuple(one.held))])
        one.stream.append(ResidencyBatch(one.snapshot.incarnation, one.snapshot.number))

    @rule(unit=st.sampled_from("ab"))
    def restart(self, unit: str) -> None:
        self.units[unit] = Unit(self._journal())
        self.publish_snapshot(unit)

    @rule(unit=st.sampled_from("ab"))
    def read(self, unit: str) -> None:
        """As `ResidencyReader` does."""
        one = self.units[unit]
        for batch in one.stream:
            if not self.index.apply(unit, batch):
                self.index.load(unit, one.snapshot)
                if not self.index.apply(unit, batch):
                    self.index.drop(unit)
        one.stream = []

    @rule(unit=st.sampled_from("ab"))
    def publish_and_read_all(self, unit: str) -> None:
        """After a snapshot the reader knows exactly what the unit holds, whatever was lost before."""
        self.publish_snapshot(unit)
        self.read(unit)
        held = self.units[unit].held
        assert self.index.is_known(unit) and self.index.num_blocks(unit) == len(held)
        for block_hash in HASHES:
            assert (unit in self.index.match(block_keys("m", [block_hash]))) is (block_hash in held)

    @invariant()
    def a_unit_that_is_not_known_holds_nothing(self) -> None:
        for unit in self.units:
            if not self.index.is_known(unit):
                assert self.index.num_blocks(unit) == 0
                assert all(unit not in self.index.match(block_keys("m", [one])) for one in HASHES)

    @invariant()
    def matches_are_those_of_each_block(self) -> None:
        chain = block_keys("m", HASHES)
        holders = [set(self.index.match((key,))) for key in chain]
        for unit in self.units:
            expected = next((index for index, units in enumerate(holders) if unit not in units), len(chain))
            assert self.index.match(chain).get(unit, 0) == expected
        assert len(self.index) == sum(bool(units) for units in holders)


TestHistories = Histories.TestCase
