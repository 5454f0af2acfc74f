"""Finds stop strings in text that arrives in pieces. Knows no tokens. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FilteredText:
    """Text that can be sent. ``stopped_by``: the stop string that ends the output, if one was found."""

    text: str
    stopped_by: str | None = None


class StopStrings:
    """Holds back the end of the text while it may be the beginning of a stop string.

    Invariant: the held-back text is the longest suffix of the text so far that is a proper prefix of a stop string.
    """

    def __init__(self, stop_strings: Sequence[str], include: bool) -> None:
        self._stops = tuple(stop_strings)
        self._include = include
        self._held = ""

    def feed(self, text: str, may_stop: bool = True) -> FilteredText:
        """Appends text. ``may_stop`` False: the output may not end yet, so a complete stop string is plain text.

        The stop string that begins first ends the output; of those that begin together, the longest.
        """
        if not self._stops:
            return FilteredText(text)
        text = self._held + text
        self._held = ""
        found = [(text.find(stop), -len(stop), stop) for stop in self._stops if may_stop and stop in text]
        if found:
            at, _, stop = min(found)
            return FilteredText(text[: at + len(stop) if self._include else at], stop)
        keep = self._open_suffix(text)
        self._held = text[len(text) - keep :]
        return FilteredText(text[: len(text) - keep])

    def flush(self) -> str:
        """Returns the held-back text, once the output has ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _open_suffix(self, text: str) -> int:
        """Length of the longest suffix that is a proper prefix of a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
