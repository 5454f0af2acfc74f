"""Records and reports of load tests with known figures."""

from __future__ import annotations

import json
from typing import Any

from loadtest.record import OK, Record, Run
from loadtest.report import About, Goodput, build_report
from loadtest.slo import Objectives, Unloaded
from loadtest.sweep import build_sweep
from muxmesh.slo import Slo

NAME = 'A <script>alert("x")</script> & B'


def make_record(
    index: int = 0,
    due_s: float = 0.0,
    times_s: tuple[float, ...] = (),
    end_s: float | None = None,
    status: str = OK,
    **fields: Any,
) -> Record:
    """A request that was sent when due. Its tokens arrived one by one at ``times_s``, with the last one it ended."""
    record = Record(index, due_s, sent_s=due_s, status=status)
    record.pieces = [(time_s, 1) for time_s in times_s]
    record.ended_s = end_s if end_s is not None or not times_s else times_s[-1]
    record.num_output = len(times_s)
    for name, value in fields.items():
        setattr(record, name, value)
    return record


def make_report(name: str = NAME, rate: float | None = 2.0, num_failed: int = 3, factor: float = 1.0) -> dict[str, Any]:
    """The report of 60 requests, ``num_failed`` of which failed. ``factor`` scales every latency."""
    records = []
    for index in range(60):
        due_s = index / 2
        first_s = due_s + factor * (0.1 + index % 7 / 20)
        times_s = tuple(first_s + 0.05 * position * factor for position in range(10))
        has_failed = index < num_failed
        records.append(
            make_record(
                index, due_s, times_s, times_s[-1] + 0.01, "UNAVAILABLE" if has_failed else OK,
                error="<b>gone</b>" if has_failed else "", model="ab"[index % 2], tenant="xy"[index % 2],
                priority=index % 3, num_input=20, finish="length",
            )
        )  # fmt: skip
    run = Run(records, 31.0, partial="interrupted <i>by</i> the user" if num_failed else "", loop_lags_s=[0.001])
    about = About(name, "a stub", ["a", "b"], "rate=2 lengths=D(1,1)", "2026-01-01", rate=rate)
    objectives = Objectives({"a": Unloaded(0.1, 0.001, 0.03), "b": Unloaded(0.1, 0.001, 0.03)}, {"b": Slo(ttft_s=0.2)})
    return build_report(about, run, Goodput(ttft_ms=200.0), objectives)


def make_sweep(rates: tuple[float, ...] = (1.0, 2.0, 4.0), num_failed: int = 0) -> dict[str, Any]:
    """A sweep whose latencies are proportional to the rate."""
    return build_sweep([make_report("s", rate, num_failed, rate) for rate in rates], 4, 0.9)


def document_sets() -> dict[str, list[dict[str, Any]]]:
    """What a page or a comparison may be made of, as it is read from files."""
    sweep = make_sweep()
    sets = {
        "one": [make_report()],
        "one without a rate or errors": [make_report(rate=None, num_failed=0)],
        "no success": [make_report(num_failed=60)],
        "two": [make_report("ours"), make_report("theirs", factor=2.0)],
        "a sweep": [sweep],
        "a sweep of one rate": [make_sweep((2.0,))],
        "two sweeps": [sweep, {**sweep, "name": "other"}],
    }
    return {name: json.loads(json.dumps(documents)) for name, documents in sets.items()}
