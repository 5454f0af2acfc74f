"""Which units hold which blocks of prompts in their prefix caches, as far as this router knows. Pure.

`router.residency_reader` fills it from Redis. It knows block keys (`muxmesh.residency_format`), no models and no
tokens. What it has may be a tenth of a second old, or older without Redis: it serves to choose a unit, never to skip
work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from muxmesh.residency_format import ResidencyBatch, ResidencySnapshot

MAX_KEYS = 1 << 20
"""Block keys that are kept: about 120 MB, and the prefixes of 16 million tokens with 16 tokens in a block."""


@dataclass(slots=True)
class _Followed:
    """What was read of a unit: everything of ``incarnation`` up to the change ``number``."""

    incarnation: int
    number: int


class ResidencyIndex:
    """Owns the map from block keys to the units that hold them.

    Invariant: a unit that `is_known` holds what its last snapshot and all later batches say; a unit that is not known
    holds nothing. At most ``max_keys`` keys are kept: further ones are left out, so the units seem to hold less.
    """

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._bits: dict[str, int] = {}
        """Unit → its bit in the values of ``_holders``."""
        self._holders: dict[int, int] = {}
        """Block key → bits of the units that hold it; no entry without any."""
        self._followed: dict[str, _Followed] = {}
        self._num_held = Counter[str]()

    def __len__(self) -> int:
        return len(self._holders)

    def is_known(self, unit: str) -> bool:
        return unit in self._followed

    def num_blocks(self, unit: str) -> int:
        """Block keys that the unit is known to hold."""
        return self._num_held[unit]

    def load(self, unit: str, snapshot: ResidencySnapshot) -> None:
        """Replaces what is known of a unit. Linear in the keys of all units if the unit was known."""
        self.drop(unit)
        self._followed[unit] = _Followed(snapshot.incarnation, snapshot.number)
        self._add(unit, snapshot.keys)

    def apply(self, unit: str, batch: ResidencyBatch) -> bool:
        """Applies the next changes of a unit; a batch that is known already changes nothing.

        False, without a change, if a snapshot has to be loaded: batches between are missing, another incarnation has
        begun, or the unit is not known.
        """
        followed = self._followed.get(unit)
        if followed is None or followed.incarnation != batch.incarnation:
            return False
        if batch.end <= followed.number:
            return True
        if batch.first != followed.number:
            return False
        self._add(unit, batch.added)
        self._remove(unit, batch.removed)
        followed.number = batch.end
        return True

    def drop(self, unit: str) -> None:
        """Forgets a unit."""
        if self._followed.pop(unit, None) is not None and self._num_held.pop(unit, 0):
            keep = ~self._bits[unit]
            self._holders = {key: left for key, bits in self._holders.items() if (left := bits & keep)}

    def drop_all(self) -> None:
        """Forgets all units."""
        self._holders, self._followed, self._num_held = {}, {}, Counter()

    def match(self, keys: Sequence[int]) -> dict[str, int]:
        """Unit → how many of the first ``keys`` it holds without a gap; only units that hold the first one."""
        matched: dict[str, int] = {}
        holding = -1
        for index, key in enumerate(keys):
            still = holding & self._holders.get(key, 0)
            if still != holding:
                if index:
                    self._note(matched, holding & ~still, index)
                if not still:
                    return matched
                holding = still
        if keys:
            self._note(matched, holding, len(keys))
        return matched

    def _note(self, matched: dict[str, int], bits: int, num_blocks: int) -> None:
        matched.update((unit, num_blocks) for unit, bit in self._bits.items() if bits & bit)

    def _add(self, unit: str, keys: Iterable[int]) -> None:
        bit = self._bits.setdefault(unit, 1 << len(self._bits))
        holders = self._holders
        for key in keys:
            bits = holders.get(key, 0)
            if not bits & bit and (bits or len(holders) < self._max_keys):
                holders[key] = bits | bit
                self._num_held[unit] += 1

    def _remove(self, unit: str, keys: Iterable[int]) -> None:
        bit = self._bits[unit]
        for key in keys:
            bits = self._holders.get(key, 0)
            if bits & bit:
                self._num_held[unit] -= 1
                if bits == bit:
                    del self._holders[key]
                else:
                    self._holders[key] = bits & ~bit
