"""What became of each request, as the driver saw it. All times are seconds from the start of the run."""

from __future__ import annotations

from dataclasses import dataclass, field

OK = "OK"
INTERRUPTED = "INTERRUPTED"
"""The run was ended while the request ran, or before it was sent."""


@dataclass(slots=True)
class Record:
    """One request. Latencies count from ``scheduled_s``, when it should have been sent, whenever it was.

    ``pieces``: (time, tokens) of each message that brought tokens. ``status``: OK, the server's word, or INTERRUPTED.
    """

    index: int
    scheduled_s: float
    model: str | None = None
    tenant: str | None = None
    priority: int = 0
    sent_s: float | None = None
    ended_s: float | None = None
    pieces: list[tuple[float, int]] = field(default_factory=list)
    num_input: int = 0
    num_cached: int | None = None
    """None: the server did not say."""
    num_output: int = 0
    finish: str | None = None
    router_s: float | None = None
    status: str = INTERRUPTED
    error: str = ""

    @property
    def is_ok(self) -> bool:
        """It has its whole answer."""
        return self.status == OK

    @property
    def ttft_s(self) -> float:
        """Time to the first token; of an answer without tokens, to its end."""
        assert self.ended_s is not None
        return (self.pieces[0][0] if self.pieces else self.ended_s) - self.scheduled_s

    @property
    def e2el_s(self) -> float:
        """Time to the end of the answer."""
        assert self.ended_s is not None
        return self.ended_s - self.scheduled_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first; None for answers of one token."""
        return (self.e2el_s - self.ttft_s) / (self.num_output - 1) if self.num_output > 1 else None

    @property
    def itls_s(self) -> list[float]:
        """Gaps between messages that brought tokens."""
        return [later - sooner for (sooner, _), (later, _) in zip(self.pieces, self.pieces[1:], strict=False)]

    @property
    def normalized_s(self) -> float:
        """Seconds of the whole request for each token of its answer (as in Orca, OSDI'22)."""
        return self.e2el_s / max(1, self.num_output)


@dataclass
class Run:
    """What a run gives. ``partial``: why it ended before its time, or empty. ``duration_s``: until the last answer."""

    records: list[Record]
    duration_s: float = 0.0
    partial: str = ""
    cpu_s: float = 0.0
    token_times: bool = True
    """False: pieces tell when an answer began and ended, and not each token."""
    loop_lags_s: list[float] = field(default_factory=list)
