"""What a router knows of one request, from its arrival to its end: the source of its metrics and of its log line. Pure.

It has no text and no token, and what a client chose freely is in `request_id` only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from muxmesh.execution import Execution
from muxmesh.slo import RequestSlo, Verdict
from muxmesh.types import NO_WAITS, Waits
from router.generation import FinishKind
from router.sequence_driver import Progress

OnGap = Callable[[float, int], None]
"""Called with the mean seconds between two tokens, and how many times."""


def _ignore(gap_s: float, count: int) -> None:
    pass


@dataclass(slots=True)
class RequestRecord:
    """``arrived_at_s`` and all times are monotonic. ``model`` is empty until the request is known to name a served one.

    ``progress`` has one entry for each sequence once the prompt is tokenized.
    """

    request_id: str
    arrived_at_s: float
    model: str = ""
    tenant: str = ""
    """Its name; empty without API keys."""
    num_prompt_tokens: int = 0
    progress: Sequence[Progress] = ()
    first_token_at_s: float | None = None
    finishes: list[FinishKind] = field(default_factory=list)
    """Of the sequences that have finished."""
    max_wait_s: float = math.inf
    """After this wait it is overdue."""
    source: str = ""
    """Origin of its expected output length; empty until there is one."""
    predicted_tokens: float = 0.0
    """Median of its expected output length."""
    slo: RequestSlo | None = None
    """None: its model has no SLO, or one that is not known yet."""
    longest_gap_s: float = 0.0
    """Between two messages with tokens of one of its sequences, whatever the cause: a step of others, a pre-emption, a
    fault. 0 with one message of each.
    """
    verdict: Verdict | None = None
    """Whether it met its SLO, once it has ended; None: it does not count."""
    _on_gap: OnGap = _ignore
    _num_tokens: list[int] = field(default_factory=list)
    """Of each sequence."""
    _last_token_at_s: list[float] = field(default_factory=list)

    def begin(self, num_prompt_tokens: int, progress: Sequence[Progress], on_gap: OnGap = _ignore) -> None:
        """The prompt is tokenized, and its sequences start."""
        self.num_prompt_tokens, self.progress, self._on_gap = num_prompt_tokens, progress, on_gap
        self._num_tokens, self._last_token_at_s = [0] * len(progress), [0.0] * len(progress)

    def add_tokens(self, index: int, num_tokens: int, now_s: float) -> None:
        """Sequence ``index`` has ``num_tokens`` new tokens, at least one. Called for each message."""
        self._num_tokens[index] += num_tokens
        last_at_s = self._last_token_at_s[index]
        self._last_token_at_s[index] = now_s
        if last_at_s:
            self.longest_gap_s = max(self.longest_gap_s, now_s - last_at_s)
            self._on_gap((now_s - last_at_s) / num_tokens, num_tokens)

    @property
    def num_output_tokens(self) -> int:
        """Of all sequences."""
        return sum(self._num_tokens)

    @property
    def longest_output(self) -> int:
        """Output tokens of the longest sequence; 0 before the first token."""
        return max(self._num_tokens, default=0)

    @property
    def has_finished(self) -> bool:
        """Whether all sequences have finished. Then the client's going away is no abort."""
        return bool(self.progress) and len(self.finishes) == len(self.progress)

    @property
    def finish(self) -> str:
        """``length`` if a sequence ended at its longest length, else ``stop``; the request has finished."""
        return "length" if FinishKind.LENGTH in self.finishes else "stop"

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens whose KV the first sequence found in the prefix cache."""
        prefilled = self.progress[0].prefilled if self.progress else None
        return prefilled.num_cached_tokens if prefilled else 0

    @property
    def num_restarts(self) -> int:
        return sum(one.num_restarts for one in self.progress)

    @property
    def waits(self) -> Waits:
        """What the first sequence waited for until its first token."""
        return self.progress[0].waits if self.progress else NO_WAITS

    def execution(self, now_s: float) -> Execution:
        """What became of all sequences together, as far as workers have reported it. Overdue in the queue counts."""
        total = Execution(is_overdue=self._is_overdue_in_queue(now_s))
        for one in self.progress:
            total = total.plus(one.execution(now_s))
        return total

    def _is_overdue_in_queue(self, now_s: float) -> bool:
        credited = [one.credited_at_s for one in self.progress] or [None]
        return any((now_s if at_s is None else at_s) - self.arrived_at_s >= self.max_wait_s for at_s in credited)

    @property
    def credited_at_s(self) -> float | None:
        """When the first sequence got its first credit."""
        return self.progress[0].credited_at_s if self.progress else None

    def phases_s(self, ended_at_s: float) -> tuple[float, float, float]:
        """Seconds in queue, in prefill and in decode. Those of a phase that was not reached are 0."""
        credited_at_s = ended_at_s if self.credited_at_s is None else self.credited_at_s
        first_at_s = ended_at_s if self.first_token_at_s is None else self.first_token_at_s
        return credited_at_s - self.arrived_at_s, first_at_s - credited_at_s, ended_at_s - first_at_s
