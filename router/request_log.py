"""One log line for each request that ends, and the same values as fields of the log record. Pure but for the logging.

It has neither prompts nor outputs, nor messages of errors, which may quote both. The line is stable:

    request id='a' tenant=t model=m finish=stop code=OK prompt_tokens=5 cached_tokens=0 output_tokens=9 queue_s=0.001
    prefill_s=0.020 decode_s=0.300 waited_for=kv:0.001,device:0.010 restarts=0 preemptions=order:1 overdue=no
    predicted=regressed:12 slo=met
"""

from __future__ import annotations

import logging
from dataclasses import fields

from muxmesh.quoting import named, quoted
from muxmesh.slo import Verdict
from muxmesh.types import Waits
from router.request_record import RequestRecord

_log = logging.getLogger("router.requests")
_CAUSES = tuple(field.name for field in fields(Waits))
_SHORTEST_WAIT_S = 0.0005


def log_request(record: RequestRecord, status: str, now_s: float) -> None:
    """Logs the end of a request. ``status``: name of its gRPC status code."""
    if not _log.isEnabledFor(logging.INFO):
        return
    queue_s, prefill_s, decode_s = record.phases_s(now_s)
    finish = record.finish if status == "OK" else "abort" if status == "CANCELLED" else "error"
    slo = _slo_text(record.verdict)
    waited_for = _waited_for(record.waits)
    execution = record.execution(now_s)
    preemptions = {str(reason): count for reason, count in execution.preemptions.items()}
    values = {
        "request_id": named(record.request_id), "tenant": record.tenant, "model": record.model, "finish": finish,
        "code": status,
        "prompt_tokens": record.num_prompt_tokens, "cached_tokens": record.num_cached_tokens,
        "output_tokens": record.num_output_tokens, "queue_s": round(queue_s, 6), "prefill_s": round(prefill_s, 6),
        "decode_s": round(decode_s, 6), "waited_for": waited_for, "restarts": record.num_restarts,
        "preemptions": preemptions, "overdue": execution.is_overdue, "source": record.source,
        "predicted_tokens": round(record.predicted_tokens, 3), "slo": slo,
    }  # fmt: skip
    _log.info(
        "request id=%s %smodel=%s finish=%s code=%s prompt_tokens=%d cached_tokens=%d output_tokens=%d queue_s=%.3f "
        "prefill_s=%.3f decode_s=%.3f waited_for=%s restarts=%d "
        "preemptions=%s overdue=%s predicted=%s slo=%s",
        quoted(record.request_id), f"tenant={record.tenant} " if record.tenant else "", record.model or "-", finish,
        status, record.num_prompt_tokens, record.num_cached_tokens, record.num_output_tokens, queue_s, prefill_s,
        decode_s, ",".join(f"{cause}:{seconds:.3f}" for cause, seconds in waited_for.items()) or "-",
        record.num_restarts,
        ",".join(f"{reason}:{count}" for reason, count in preemptions.items()) or "-",
        "yes" if execution.is_overdue else "no",
        f"{record.source}:{record.predicted_tokens:.0f}" if record.source else "-", slo,
        extra=values,
    )  # fmt: skip


def _slo_text(verdict: Verdict | None) -> str:
    """Whether a request met its SLO: ``met``, what it missed, as ``missed:ttft,tpot``, or - if it does not count."""
    if verdict is None:
        return "-"
    missed = [name for name in ("ttft", "tpot") if not getattr(verdict, name)]
    return f"missed:{','.join(missed)}" if missed else "met"


def _waited_for(waits: Waits) -> dict[str, float]:
    """Seconds by cause, without those that round to 0."""
    found = {name.removesuffix("_s"): round(getattr(waits, name), 6) for name in _CAUSES}
    return {cause: seconds for cause, seconds in found.items() if seconds >= _SHORTEST_WAIT_S}
