"""The lengths of outputs in the order in which they started, so that a predictor learns from a fair sample. Pure.

In the order of completion short outputs come first. After a burst of requests, a predictor that learns each output when
it completes sees only the short ones for a while, and predicts ever shorter lengths. In the order of start no length is
preferred.
"""

from __future__ import annotations

from typing import Generic, TypeVar

_Known = TypeVar("_Known")

MAX_HELD = 128
"""Known lengths that are held back at most for an output that started earlier and has not ended."""


class StartOrder(Generic[_Known]):
    """Owns the outputs that have started and whose lengths have not been returned.

    What is known of an output when it ends is returned once all outputs that started before it have ended, or once
    ``max_held`` later ones are held back: an output that goes on for hours does not stop the predictor from learning.
    """

    def __init__(self, max_held: int = MAX_HELD) -> None:
        self._max_held = max_held
        self._outputs: dict[int, list[_Known]] = {}
        """Number → what is known, empty until it ends; in the order of start."""
        self._next = 0
        self._num_held = 0

    def start(self) -> int:
        """An output has started; returns its number."""
        self._next += 1
        self._outputs[self._next] = []
        return self._next

    def end(self, number: int, known: _Known) -> list[_Known]:
        """The output ``number`` has ended; returns what is to be learned now, in order."""
        self._outputs[number].append(known)
        self._num_held += 1
        returned: list[_Known] = []
        while self._num_held:
            first = next(iter(self._outputs))
            if not self._outputs[first]:
                if self._num_held <= self._max_held:
                    break
                first = next(number for number, held in self._outputs.items() if held)
            returned += self._outputs.pop(first)
            self._num_held -= 1
        return returned
