"""The changes of a unit's prefix cache that are not published yet. Pure.

It knows block hashes and models, neither Redis nor time. `kvstore.residency_publisher` publishes what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from muxmesh.residency_format import ResidencyBatch, ResidencySnapshot, block_key, block_keys, model_salt

MAX_CHANGES = 1 << 16
"""Changes that are kept. After more, only a snapshot has all of them."""

Contents = Iterable[tuple[str, Sequence[bytes]]]
"""What a prefix cache holds: each model with the hashes of its published blocks."""


def _ignore() -> None:
    pass


class ResidencyJournal:
    """Owns the numbers of the changes, and the changes since the last batch or snapshot.

    Invariant: the keys of the last snapshot, with all later batches and the kept changes applied in order, are those of
    the blocks that the prefix cache holds, unless `has_lost_changes`. Each change has a number of its own; numbers of
    changes that only a snapshot has are never those of a batch.
    """

    def __init__(self, incarnation: int, max_changes: int = MAX_CHANGES) -> None:
        """``incarnation``: of this kvstore, 64 bits."""
        self.on_change: Callable[[], None] = _ignore
        """Called when there is a change after none."""
        self.has_lost_changes = False
        self._incarnation = incarnation
        self._max_changes = max_changes
        self._number = 0
        self._changes: dict[int, bool] = {}
        """Block key → whether the cache holds it now."""
        self._salts: dict[str, int] = {}

    def note(self, model: str, block_hash: bytes, is_held: bool) -> None:
        """A block entered the prefix cache under its hash, or was evicted."""
        if self.has_lost_changes:
            return
        if (salt := self._salts.get(model)) is None:
            salt = self._salts[model] = model_salt(model)
        is_first = not self._changes
        self._changes[block_key(salt, block_hash)] = is_held
        if len(self._changes) > self._max_changes:
            self.has_lost_changes = True
        if is_first:
            self.on_change()

    def take_batch(self) -> ResidencyBatch | None:
        """The changes since the last batch or snapshot; None without any. Not to be called after lost changes."""
        assert not self.has_lost_changes, "only a snapshot has lost changes"
        if not self._changes:
            return None
        added = tuple(key for key, is_held in self._changes.items() if is_held)
        removed = tuple(key for key, is_held in self._changes.items() if not is_held)
        batch = ResidencyBatch(self._incarnation, self._number, added, removed)
        self._changes, self._number = {}, batch.end
        return batch

    def take_snapshot(self, contents: Contents) -> ResidencySnapshot:
        """Everything that the prefix cache holds now. Readers of batches notice changes that no batch has."""
        self._number += len(self._changes)
        self._changes, self.has_lost_changes = {}, False
        keys = dict.fromkeys(key for model, hashes in contents for key in block_keys(model, hashes))
        return ResidencySnapshot(self._incarnation, self._number, tuple(keys))
