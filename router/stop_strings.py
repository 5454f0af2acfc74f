"""Finds stop strings in text that arrives in pieces. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Passed:
    """Text that may be sent. ``stopped_by``: the stop string that ended the output; nothing follows."""

    text: str
    stopped_by: str | None = None


class StopStrings:
    """Holds back the end of the text while it may become a stop string.

    Invariant: the held-back text is the longest suffix of the text so far that is a prefix of a stop string.
    """

    def __init__(self, stop_strings: Sequence[str], include: bool) -> None:
        self._stops = tuple(stop_strings)
        self._include = include
        self._held = ""

    def feed(self, text: str, may_stop: bool = True) -> Passed:
        """Appends text. ``may_stop`` False: too early for the output to end, so a complete stop string passes."""
        if not self._stops:
            return Passed(text)
        text = self._held + text
        self._held = ""
        found = [(text.find(stop), -len(stop), stop) for stop in self._stops if may_stop and stop in text]
        if found:
            at, _, stop = min(found)
            return Passed(text[: at + len(stop) if self._include else at], stop)
        keep = self._open_suffix(text)
        self._held = text[len(text) - keep :]
        return Passed(text[: len(text) - keep])

    def flush(self) -> str:
        """The output ended otherwise: returns the held-back text."""
        held, self._held = self._held, ""
        return held

    def _open_suffix(self, text: str) -> int:
        """Length of the suffix to hold back."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
