import io
import json
import logging
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.errors import ConfigError
from muxmesh.log_format import JsonFormatter, format_of, formatter_of, json_line, output_as_json


def record(message: str, *arguments: object, **fields: Any) -> logging.LogRecord:
    made = logging.getLogger("muxmesh.x").makeRecord("muxmesh.x", logging.WARNING, "f", 1, message, arguments, None)
    made.created = 1_795_683_600.1239
    vars(made).update(fields)
    return made


def test_a_record_is_an_object_with_its_time_in_utc() -> None:
    assert json.loads(JsonFormatter("decode/m").format(record("lost %d", 2))) == {
        "time": "2026-11-26T09:00:00.123Z",
        "level": "WARNING",
        "logger": "muxmesh.x",
        "process": "decode/m",
        "message": "lost 2",
    }


def test_fields_of_a_record_are_fields_of_its_object_and_replace_none() -> None:
    fields = {"model": "m", "seconds": {"queue": 0.5}, "tokens": [1, 2], "time": "mine", "who": object}
    found = json.loads(JsonFormatter("router").format(record("finished", **fields)))
    assert (found["model"], found["seconds"], found["tokens"]) == ("m", {"queue": 0.5}, [1, 2])
    assert found["time"] == "2026-11-26T09:00:00.123Z"
    assert found["who"] == str(object)


def test_numbers_that_json_does_not_have_are_text() -> None:
    line = JsonFormatter("router").format(record("x", one=float("nan"), more=[float("inf")]))
    found = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (found["one"], found["more"]) == ("nan", ["inf"])


def test_an_exception_is_one_field() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter("router"))
    try:
        raise LookupError("no such unit")
    except LookupError:
        made = record("failed", stack_info="Stack:\n  line")
        made.exc_info = sys.exc_info()
        handler.handle(made)
    (line,) = stream.getvalue().splitlines()
    found = json.loads(line)
    assert found["message"] == "failed"
    assert found["exception"].startswith("Traceback") and found["exception"].endswith("LookupError: no such unit")
    assert found["stack"] == "Stack:\n  line"


@given(st.text())
def test_an_object_is_one_line_whatever_the_message_is(message: str) -> None:
    line = JsonFormatter("p").format(record("%s", message))
    assert line.isascii() and line.isprintable()
    assert json.loads(line)["message"] == message


@pytest.mark.parametrize("text", ['{"a": 1}', "{}"])
def test_an_object_that_a_process_prints_stays_as_it_is(text: str) -> None:
    assert output_as_json("kvstore/u", text, 0.0) is text


@pytest.mark.parametrize("text", ["", "I0000 grpc: {", "{not json}", "[1]", '{"cut": ', '"text"', "{" * 100_000])
def test_any_other_line_becomes_the_message_of_an_object(text: str) -> None:
    assert json.loads(output_as_json("kvstore/u", text, 0.0)) == {
        "time": "1970-01-01T00:00:00.000Z",
        "level": "INFO",
        "logger": "output",
        "process": "kvstore/u",
        "message": text,
    }


def test_an_object_without_a_record_has_the_same_fields() -> None:
    line = json_line(1_795_683_600.1239, "WARNING", "muxmesh.x", "decode/m", "lost 2")
    assert line == JsonFormatter("decode/m").format(record("lost %d", 2))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, "text"), ({"MUXMESH_LOG_FORMAT": ""}, "text"), ({"MUXMESH_LOG_FORMAT": "json"}, "json")],
)
def test_the_environment_names_the_format(environment: dict[str, str], expected: str) -> None:
    assert format_of(environment) == expected


def test_another_format_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"^MUXMESH_LOG_FORMAT is 'JSON'; must be text or json$"):
        format_of({"MUXMESH_LOG_FORMAT": "JSON"})


def test_text_has_level_logger_and_message() -> None:
    assert formatter_of("text", "router").format(record("a\nb")) == "WARNING muxmesh.x: a\\nb"
