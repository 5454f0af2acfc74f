"""The router's record of one output sequence: tokens, text, stop strings and the finish. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from muxmesh.models.detokenizer import Detokenizer
from muxmesh.types import Finish, FinishReason, Stopping, TokenLogprobs
from router.generation import FinishKind, OutputFinish, SequenceDelta
from router.stop_strings import StopStrings

_KINDS = {
    FinishReason.LENGTH: FinishKind.LENGTH,
    FinishReason.EOS: FinishKind.EOS,
    FinishReason.STOP_TOKEN: FinishKind.STOP_TOKEN,
}


class SequenceOutput:
    """Owns the output of one sequence over all attempts to compute it.

    Invariant: an appended token never changes, and no token or text follows the finish.
    """

    def __init__(
        self,
        stopping: Stopping,
        detokenizer: Detokenizer | None = None,
        stop_strings: StopStrings | None = None,
        include_stop: bool = False,
    ) -> None:
        """``detokenizer`` None: no text and no stop strings. ``include_stop``: the text includes the stop token."""
        self.token_ids: list[int] = []
        self.finish: OutputFinish | None = None
        self._stopping = stopping
        self._detokenizer = detokenizer
        self._stop_strings = stop_strings or StopStrings((), include_stop)
        self._include_stop = include_stop

    @property
    def token_finish(self) -> Finish | None:
        """The finish that the last token causes, or None. A lost worker may not have reported it."""
        return self._stopping.finish_after(self.token_ids[-1], len(self.token_ids)) if self.token_ids else None

    def append(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] = ()) -> SequenceDelta:
        """Appends tokens; returns them with their text. Tokens after the end of a stop string are dropped."""
        start, parts = len(self.token_ids), []
        for token_id in token_ids:
            self.token_ids.append(token_id)
            if self._detokenizer is None:
                continue
            released = self._stop_strings.feed(self._text_of(self._detokenizer, token_id), self._may_stop)
            parts.append(released.text)
            if released.stopped_by is not None:
                self._finish_by_string(released.stopped_by)
                break
        new = tuple(self.token_ids[start:])
        return SequenceDelta(new, "".join(parts), tuple(logprobs[: len(new)]), self.finish)

    def complete(self, finish: Finish) -> SequenceDelta:
        """Records that a token or the length finished the sequence; returns the text that was held back."""
        text = ""
        if self._detokenizer is not None:
            released = self._stop_strings.feed(self._detokenizer.flush(), self._may_stop)
            text = released.text
            if released.stopped_by is not None:
                self._finish_by_string(released.stopped_by)
            else:
                text += self._stop_strings.flush()
        if self.finish is None:
            self.finish = OutputFinish(_KINDS[finish.reason], len(self.token_ids), finish.token_id)
        return SequenceDelta((), text, (), self.finish)

    @property
    def _may_stop(self) -> bool:
        return len(self.token_ids) >= self._stopping.min_new_tokens

    def _finish_by_string(self, stop_string: str) -> None:
        self.finish = OutputFinish(FinishKind.STOP_STRING, len(self.token_ids), stop_string=stop_string)

    def _text_of(self, detokenizer: Detokenizer, token_id: int) -> str:
        """Text of the last token. A token that ends the sequence has none, unless ``include_stop``."""
        finish = self.token_finish
        if finish is not None and finish.reason is not FinishReason.LENGTH and not self._include_stop:
            return ""
        return detokenizer.feed(token_id)
