"""For how long each entry that waits for admission has waited for what. Pure; time is an argument."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from muxmesh.types import WaitCause, Waits

EntryKey = tuple[str, int]
"""Source and id of an entry, see `kvstore.admission.AdmissionEntry`."""


@dataclass(slots=True)
class _Wait:
    """``cause`` has held since ``since_s``; ``seconds`` are those of the causes before it."""

    cause: WaitCause
    since_s: float
    seconds: dict[WaitCause, float] = field(default_factory=dict)

    def until(self, now_s: float) -> dict[WaitCause, float]:
        """Seconds by cause until ``now_s``."""
        return self.seconds | {self.cause: self.seconds.get(self.cause, 0.0) + max(0.0, now_s - self.since_s)}

    def change(self, cause: WaitCause, now_s: float) -> None:
        if cause is not self.cause:
            self.seconds, self.cause, self.since_s = self.until(now_s), cause, now_s


class WaitTimes:
    """Owns the waits of the entries that the last admission left waiting.

    Invariant: an entry that is not in ``_first`` waits for those before it.
    """

    def __init__(self) -> None:
        self._waits: dict[EntryKey, _Wait] = {}
        self._first: set[EntryKey] = set()

    def of(self, key: EntryKey, now_s: float) -> Waits:
        """What an entry has waited for until ``now_s``; nothing if no admission has left it waiting."""
        wait = self._waits.get(key)
        return Waits() if wait is None else Waits(**{f"{cause}_s": s for cause, s in wait.until(now_s).items()})

    def update(self, waiting: Set[EntryKey], first: Mapping[EntryKey, WaitCause], now_s: float) -> None:
        """Records what the ``waiting`` entries wait for from now on: those of ``first`` for the cause that is given."""
        if self._waits.keys() != waiting:
            for key in self._waits.keys() - waiting:
                del self._waits[key]
            for key in waiting - self._waits.keys():
                self._waits[key] = _Wait(WaitCause.ORDER, now_s)
        for key in self._first - first.keys():
            if key in self._waits:
                self._waits[key].change(WaitCause.ORDER, now_s)
        for key, cause in first.items():
            self._waits[key].change(cause, now_s)
        self._first = set(first)
