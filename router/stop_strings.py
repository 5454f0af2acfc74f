"""Finds stop strings in text that arrives in pieces. Knows no tokens. Pure.

The strings form one automaton (Aho and Corasick, Efficient string matching, 1975, sections 2 and 3), so that the work
for a character does not grow with their lengths. Only the states that a text reaches are built.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

_ROOT = 0


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
        self._automaton = _Automaton(stop_strings) if stop_strings else None
        self._include = include
        self._held = ""
        self._state = _ROOT

    def feed(self, text: str, may_stop: bool = True) -> FilteredText:
        """Appends text. ``may_stop`` False: the output may not end yet, so a complete stop string is plain text.

        The stop string that begins first ends the output; of those that begin together, the longest.
        """
        automaton = self._automaton
        if automaton is None or (self._state == _ROOT and automaton.first_characters.isdisjoint(text)):
            return FilteredText(text)
        found: list[tuple[int, int, str]] = []
        for end, character in enumerate(text, len(self._held) + 1):
            self._state = automaton.next_state(self._state, character)
            stop = automaton.longest_match[self._state]
            if stop is not None and may_stop:
                found.append((end - len(stop), -len(stop), stop))
        text = self._held + text
        if found:
            self._held, self._state = "", _ROOT
            at, _, stop = min(found)
            return FilteredText(text[: at + len(stop) if self._include else at], stop)
        self._state = automaton.open_state(self._state)
        num_sent = len(text) - automaton.depth[self._state]
        self._held = text[num_sent:]
        return FilteredText(text[:num_sent])

    def flush(self) -> str:
        """Returns the held-back text, once the output has ended without a stop string."""
        held, self._held, self._state = self._held, "", _ROOT
        return held


class _Automaton:
    """States are the prefixes of the stop strings. The state after a text is its longest suffix among them."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.first_characters = frozenset(stop[0] for stop in stops)
        self.depth: list[int] = []
        """Length of each state's prefix."""
        self.longest_match: list[str | None] = []
        """The longest stop string that each state ends with."""
        self._continued: list[dict[str, list[str]]] = []  # the stop strings that continue it, by their next character
        self._next: list[dict[str, int]] = []
        self._shorter: list[int] = []  # the state of the longest proper suffix
        self._add_state(stops, 0, _ROOT)

    def next_state(self, state: int, character: str) -> int:
        """The state after one more character. Amortized over a text, constant work for each stop string."""
        while state and character not in self._continued[state]:
            state = self._shorter[state]
        following = self._next[state].get(character)
        if following is not None:
            return following
        stops = self._continued[state].get(character)
        if stops is None:
            return _ROOT
        shorter = self.next_state(self._shorter[state], character) if state else _ROOT
        following = self._next[state][character] = self._add_state(stops, self.depth[state] + 1, shorter)
        return following

    def open_state(self, state: int) -> int:
        """The longest suffix of ``state`` that is a proper prefix of a stop string."""
        while state and not self._continued[state]:
            state = self._shorter[state]
        return state

    def _add_state(self, stops: Sequence[str], depth: int, shorter: int) -> int:
        """Adds the state of the first ``depth`` characters, which ``stops`` begin with."""
        continued: defaultdict[str, list[str]] = defaultdict(list)
        match = self.longest_match[shorter] if depth else None
        for stop in stops:
            if len(stop) > depth:
                continued[stop[depth]].append(stop)
            else:
                match = stop
        self.depth.append(depth)
        self.longest_match.append(match)
        self._continued.append(dict(continued))
        self._next.append({})
        self._shorter.append(shorter)
        return len(self.depth) - 1
