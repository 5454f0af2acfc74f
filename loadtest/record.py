"""The outcome of each request as the driver measured it. All times are seconds from the start of the run."""

from __future__ import annotations

from dataclasses import dataclass, field

OK = "OK"
INTERRUPTED = "INTERRUPTED"
"""Status of a request that was running, or not yet sent, when the run was stopped."""


@dataclass(slots=True)
class Record:
    """One request. Latencies count from ``scheduled_s``, when the request was due, and not from ``sent_s``.

    ``pieces``: (time, tokens) of each message that carried tokens. ``status``: OK, INTERRUPTED or the server's own
    status. The latency properties need ``ended_s``.
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
    """None: the server does not report it."""
    num_output: int = 0
    finish: str | None = None
    router_s: float | None = None
    status: str = INTERRUPTED
    error: str = ""

    @property
    def is_ok(self) -> bool:
        return self.status == OK

    @property
    def ttft_s(self) -> float:
        """Time to the first token, or to the end of an output without tokens."""
        assert self.ended_s is not None
        return (self.pieces[0][0] if self.pieces else self.ended_s) - self.scheduled_s

    @property
    def e2el_s(self) -> float:
        assert self.ended_s is not None
        return self.ended_s - self.scheduled_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None for outputs of at most one token."""
        return (self.e2el_s - self.ttft_s) / (self.num_output - 1) if self.num_output > 1 else None

    @property
    def itls_s(self) -> list[float]:
        """Gaps between messages that carried tokens."""
        return [later - sooner for (sooner, _), (later, _) in zip(self.pieces, self.pieces[1:], strict=False)]

    @property
    def normalized_s(self) -> float:
        """End-to-end latency per output token (normalized latency of Orca, OSDI'22)."""
        return self.e2el_s / max(1, self.num_output)


@dataclass
class Run:
    """The records of a run.

    ``duration_s``: until the last output ended, or until the run was stopped. ``partial``: why the run was stopped;
    empty if it was not. ``cpu_s``: CPU time of the driver. ``loop_lags_s``: how late the driver's event loop was.
    """

    records: list[Record]
    duration_s: float = 0.0
    partial: str = ""
    cpu_s: float = 0.0
    token_times: bool = True
    """False: ``pieces`` give the start and the end of an output, and not the time of each token."""
    loop_lags_s: list[float] = field(default_factory=list)
