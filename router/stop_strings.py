"""Finds stop strings in text that comes in pieces. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Passed:
    """Text that may be sent. ``stopped_by``: the stop string that ended the answer; nothing comes after it."""

    text: str
    stopped_by: str | None = None


class StopStrings:
    """Holds back the end of the text for as long as it may become a stop string.

    Invariant: what is held back is the longest end of the text so far that begins a stop string.
    """

    def __init__(self, stop_strings: Sequence[str], include: bool) -> None:
        self._stops = tuple(stop_strings)
        self._include = include
        self._held = ""

    def feed(self, text: str, may_stop: bool = True) -> Passed:
        """Takes more text. ``may_stop`` False: too early for the answer to end, so a whole stop string passes."""
        if not self._stops:
            return Passed(text)
        text = self._held + text
        self._held = ""
        found = [(text.find(stop), -len(stop), stop) for stop in self._stops if may_stop and stop in text]
        if found:
            at, _, stop = min(found)
            return Passed(text[: at + len(stop) if self._include else at], stop)
        keep = self._open_end(text)
        self._held = text[len(text) - keep :]
        return Passed(text[: len(text) - keep])

    def flush(self) -> str:
        """The answer ended otherwise: what was held back."""
        held, self._held = self._held, ""
        return held

    def _open_end(self, text: str) -> int:
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
