"""Turns the tokens of one answer into what the client sees: text, stop strings, the finish. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muxmesh.models.tokenizer import Detokenizer
from muxmesh.types import Finish, FinishReason, Stopping
from router.stop_strings import StopStrings


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new for the client. ``stopped_by``: a stop string ended the answer here."""

    token_ids: tuple[int, ...]
    text: str
    stopped_by: str | None = None


class Answer:
    """Owns the output tokens of a request, across every attempt. Invariant: a token once taken never changes."""

    def __init__(self, stopping: Stopping, detokenizer: Detokenizer | None, stops: StopStrings, include: bool) -> None:
        """``detokenizer`` None: no text is wanted. ``include``: the text of what ended the answer stays in it."""
        self.token_ids: list[int] = []
        self._stopping = stopping
        self._detokenizer = detokenizer
        self._stops = stops
        self._include = include

    def take(self, token_ids: Sequence[int]) -> Delta:
        """New tokens, in order. Tokens after the one that completes a stop string are dropped."""
        taken, parts = [], []
        for token_id in token_ids:
            taken.append(token_id)
            self.token_ids.append(token_id)
            if self._detokenizer is None:
                continue
            passed = self._stops.feed(self._text_of(token_id), self._may_stop())
            parts.append(passed.text)
            if passed.stopped_by is not None:
                return Delta(tuple(taken), "".join(parts), passed.stopped_by)
        return Delta(tuple(taken), "".join(parts))

    def finish(self) -> Delta:
        """The answer ended by a token or its length: gives out what was held back."""
        if self._detokenizer is None:
            return Delta((), "")
        passed = self._stops.feed(self._detokenizer.flush(), self._may_stop())
        text = passed.text if passed.stopped_by else passed.text + self._stops.flush()
        return Delta((), text, passed.stopped_by)

    def _may_stop(self) -> bool:
        return len(self.token_ids) >= self._stopping.min_new_tokens

    def _text_of(self, token_id: int) -> str:
        """Text of a token; the token that ends the answer has none unless it is to be included."""
        assert self._detokenizer is not None
        finish = self._stopping.finish_after(token_id, len(self.token_ids))
        if isinstance(finish, Finish) and finish.reason is not FinishReason.LENGTH and not self._include:
            return ""
        return self._detokenizer.feed(token_id)
