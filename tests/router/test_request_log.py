import json
import logging

import pytest

from muxmesh.execution import Execution, PreemptionReason
from muxmesh.log_format import JsonFormatter
from muxmesh.quoting import OneLineFormatter
from muxmesh.slo import Verdict
from muxmesh.types import Waits
from router.attempt import Prefilled
from router.generation import FinishKind
from router.request_log import log_request
from router.request_record import RequestRecord
from router.sequence_driver import Progress


def record(request_id: str = "r-1") -> RequestRecord:
    found = RequestRecord(request_id, 100.0, "m")
    waits = Waits(kv_s=0.75, device_s=0.0004, order_s=0.25)
    execution = Execution({PreemptionReason.ORDER: 2, PreemptionReason.KV_FULL: 1}, is_overdue=True)
    progress = Progress(101.0, prefilled=Prefilled(3), num_restarts=2, waits=waits, ended=execution)
    found.begin(7, [progress])
    found.source, found.predicted_tokens = "hint", 40.25
    found.first_token_at_s = 104.0
    found.add_tokens(0, 5, 104.0)
    found.finishes.append(FinishKind.LENGTH)
    return found


@pytest.fixture(autouse=True)
def info_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "router.requests")


def test_a_request_is_one_line_with_all_that_matters(caplog: pytest.LogCaptureFixture) -> None:
    log_request(record(), "OK", 112.0)
    assert caplog.messages == [
        "request id='r-1' model=m finish=length code=OK prompt_tokens=7 cached_tokens=3 output_tokens=5 queue_s=1.000 "
        "prefill_s=3.000 decode_s=8.000 waited_for=kv:0.750,order:0.250 restarts=2 "
        "preemptions=order:2,kv_full:1 overdue=yes predicted=hint:40 slo=-"
    ]


def test_the_fields_of_a_log_record_have_the_same_values(caplog: pytest.LogCaptureFixture) -> None:
    log_request(record(), "OK", 112.0)
    fields = vars(caplog.records[0])
    expected = {
        "request_id": "r-1", "model": "m", "finish": "length", "code": "OK", "prompt_tokens": 7, "cached_tokens": 3,
        "output_tokens": 5, "queue_s": 1.0, "prefill_s": 3.0, "decode_s": 8.0, "restarts": 2,
        "waited_for": {"kv": 0.75, "order": 0.25}, "preemptions": {"order": 2, "kv_full": 1}, "overdue": True,
        "source": "hint", "predicted_tokens": 40.25,
    }  # fmt: skip
    assert {name: fields[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("ttft", "tpot", "text"),
    [
        (True, True, "met"),
        (False, True, "missed:ttft"),
        (True, False, "missed:tpot"),
        (False, False, "missed:ttft,tpot"),
    ],
)
def test_a_request_that_has_an_slo_met_it_or_missed_something(
    caplog: pytest.LogCaptureFixture, ttft: bool, tpot: bool, text: str
) -> None:
    found = record()
    found.verdict = Verdict(ttft, tpot, e2el=True)
    log_request(found, "OK", 112.0)
    assert caplog.text.rstrip().endswith(f" slo={text}")


@pytest.mark.parametrize(("status", "finish"), [("CANCELLED", "abort"), ("UNAVAILABLE", "error")])
def test_a_request_that_did_not_finish_has_its_status(
    caplog: pytest.LogCaptureFixture, status: str, finish: str
) -> None:
    log_request(RequestRecord("r", 100.0, ""), status, 101.0)
    assert f"id='r' model=- finish={finish} code={status} prompt_tokens=0" in caplog.text
    assert "queue_s=1.000 prefill_s=0.000 decode_s=0.000 waited_for=- restarts=0 preemptions=- " in caplog.text
    assert caplog.text.rstrip().endswith(" overdue=no predicted=- slo=-")


def test_a_hostile_id_stays_in_one_short_line(caplog: pytest.LogCaptureFixture) -> None:
    hostile = "a\nERROR router: pool full\x1b[31m' model=x " + "z" * 10_000
    log_request(record(hostile), "OK", 112.0)
    line = OneLineFormatter("%(message)s").format(caplog.records[0])
    assert line.startswith("request id=\"a\\nERROR router: pool full\\x1b[31m' model=x zzz")
    assert len(line) < 400
    assert "\n" not in line and "\x1b" not in line
    assert len(vars(caplog.records[0])["request_id"]) <= 103
    assert "\n" not in vars(caplog.records[0])["request_id"]


def test_in_json_the_values_are_fields_of_the_object(caplog: pytest.LogCaptureFixture) -> None:
    log_request(record(), "OK", 112.0)
    written = json.loads(JsonFormatter("router").format(caplog.records[0]))
    assert written["message"] == caplog.messages[0]
    assert (written["request_id"], written["output_tokens"], written["decode_s"]) == ("r-1", 5, 8.0)
    assert written["waited_for"] == {"kv": 0.75, "order": 0.25}
