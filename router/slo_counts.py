"""How many requests of one model met its SLO: since the router started, and recently. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from muxmesh.slo import FAILED, Verdict
from router.request_record import RequestRecord

WINDOW_S = 60.0
"""Length of the recent window, give or take a bucket."""
_BUCKET_S = 5.0

_NOT_COUNTED = frozenset({"CANCELLED", "INVALID_ARGUMENT", "NOT_FOUND"})
"""gRPC status codes of requests that their client cancelled, or that are invalid. A deadline cancels, too."""


def verdict_of(record: RequestRecord, status: str, now_s: float) -> Verdict | None:
    """Whether a request that ended met its SLO; None: it has none, or does not count.

    One that failed or was refused, as by an overload, missed it. A request of several sequences is judged by the length
    of the longest, and by the seconds between its first token and the end of the last sequence.
    """
    if record.slo is None or status in _NOT_COUNTED:
        return None
    if status != "OK" or record.first_token_at_s is None:
        return FAILED
    num_output = max(1, record.longest_output)
    return record.slo.verdict(
        record.num_prompt_tokens,
        num_output,
        record.first_token_at_s - record.arrived_at_s,
        (now_s - record.first_token_at_s) / (num_output - 1) if num_output > 1 else None,
        now_s - record.arrived_at_s,
    )


@dataclass(slots=True)
class SloTally:
    """Numbers of requests. ``met``: TTFT and TPOT; ``e2el_met``: the end-to-end rule, see `muxmesh.slo.Verdict`."""

    num_requests: int = 0
    num_met: int = 0
    num_ttft_met: int = 0
    num_tpot_met: int = 0
    num_e2el_met: int = 0

    def add(self, verdict: Verdict) -> None:
        self.num_requests += 1
        self.num_met += verdict.met
        self.num_ttft_met += verdict.ttft
        self.num_tpot_met += verdict.tpot
        self.num_e2el_met += verdict.e2el

    def plus(self, other: SloTally) -> SloTally:
        return SloTally(
            self.num_requests + other.num_requests,
            self.num_met + other.num_met,
            self.num_ttft_met + other.num_ttft_met,
            self.num_tpot_met + other.num_tpot_met,
            self.num_e2el_met + other.num_e2el_met,
        )


@dataclass(slots=True)
class SloCounts:
    """Owns the tallies of one model. ``now_s`` is monotonic."""

    total: SloTally = field(default_factory=SloTally)
    _buckets: deque[tuple[float, SloTally]] = field(default_factory=deque)
    """(start, tally) of the last buckets that have a request, oldest first."""

    def add(self, verdict: Verdict, now_s: float) -> None:
        """Counts a request that ended now."""
        self.total.add(verdict)
        start_s = now_s - now_s % _BUCKET_S
        if not self._buckets or self._buckets[-1][0] != start_s:
            self._drop_old(now_s)
            self._buckets.append((start_s, SloTally()))
        self._buckets[-1][1].add(verdict)

    def recent(self, now_s: float) -> SloTally:
        """The requests that ended within the last `WINDOW_S`."""
        self._drop_old(now_s)
        tally = SloTally()
        for _, one in self._buckets:
            tally = tally.plus(one)
        return tally

    def _drop_old(self, now_s: float) -> None:
        while self._buckets and self._buckets[0][0] <= now_s - WINDOW_S:
            self._buckets.popleft()
