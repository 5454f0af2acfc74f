"""A workload's line: what is understood, and what is refused by name."""

import math

import pytest

from loadtest.spec import parse_spec
from muxmesh.errors import ConfigError

GOOD = "rate=4 lengths=D(10,5) requests=3"


def test_a_line_with_everything() -> None:
    spec = parse_spec(
        "rate=2.5 burstiness=0.25 lengths=N(480,240)/(300,150) requests=50 duration=60 models=a:3,b "
        "tenants=x,y:3 priorities=0:9,-1 output=forced cap=64 seed=7"
    )
    assert (spec.rate, spec.burstiness, spec.requests, spec.duration, spec.seed) == (2.5, 0.25, 50, 60.0, 7)
    assert spec.models == (("a", 0.75), ("b", 0.25))
    assert (spec.tenants, spec.priorities) == ((("x", 0.25), ("y", 0.75)), (("0", 0.9), ("-1", 0.1)))
    assert (spec.output, spec.cap) == ("forced", 64)


def test_a_path_may_have_spaces() -> None:
    assert parse_spec("trace='my traces/a.csv' time_scale=0.5").trace == "my traces/a.csv"


def test_all_at_once() -> None:
    assert parse_spec("rate=inf lengths=D(1,1) requests=2").rate == math.inf


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "needs rate=R .* or trace=FILE"),
        ("rate=4 requests=1", "needs lengths=..., prompts=FILE or trace"),
        ("rate=4 lengths=D(1,1)", "needs requests=N or duration=S"),
        ("rate=inf lengths=D(1,1) duration=5", "rate=inf needs requests"),
        ("rate=-1 lengths=D(1,1) requests=1", "rate=-1: must be at least 0"),
        ("rate=0 lengths=D(1,1) requests=1", "rate=0: must be more than 0"),
        ("rate=nan lengths=D(1,1) requests=1", "rate=nan: must be at least 0"),
        ("rate=fast lengths=D(1,1) requests=1", "rate=fast: is no number"),
        (f"{GOOD} rate=5", "rate is given twice"),
        (f"{GOOD} color=red", "'color=red' is no setting; these are"),
        (f"{GOOD} seed", "'seed' is no setting"),
        ("rate=1 lengths=D(1,1) requests=1.5", "requests=1.5: is no whole number"),
        ("rate=1 lengths=D(1,1) requests=0", "requests=0: must be at least 1"),
        (f"{GOOD} output=long", "output=long: one of: natural, forced"),
        (f"{GOOD} models=a,a", "models=a,a: names, each once"),
        (f"{GOOD} models=a:-1", "models=a:-1: must be at least 0"),
        (f"{GOOD} priorities=high", "'high' is no priority"),
        (f"{GOOD} alpha=1", "alpha=... needs models"),
        (f"{GOOD} prompts=x.jsonl", "not both"),
        (f"{GOOD} chat=yes", "chat=yes needs prompts"),
        (f"{GOOD} time_scale=2", "time_scale scales a trace; there is none"),
        ("trace=a.csv rate=2", "leave out rate and lengths"),
        ("trace=a.csv burstiness=2", "burstiness is of arrivals at a rate"),
        ("rate=1 prompts=a.jsonl requests=1 max_input=5", "max_input and input_scale are of random prompts"),
        ("trace=a.csv prompts=a.jsonl output_scale=2", "it needs output=forced"),
        (f"{GOOD} models=a:3,b alpha=1", "has weights already"),
        ("rate=1 'lengths=D(1,1)", "No closing quotation"),
    ],
)
def test_what_is_wrong_is_named(line: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_spec(line)
