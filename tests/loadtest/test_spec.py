"""The line of a workload: which settings it takes, and which errors name what is wrong."""

import math
import re
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.spec import HELP, Spec, parse_spec
from muxmesh.errors import ConfigError
from muxmesh.quoting import quoted

GOOD = "rate=4 lengths=D(10,5) requests=3"


def test_a_line_with_most_settings() -> None:
    line = (
        "rate=2.5 burstiness=0.25 lengths=N(480,240)/(300,150) requests=50 duration=60 models=a:3,b "
        "tenants=x,y:3 priorities=0:9,-1 output=forced cap=64 seed=7 max_input=100"
    )
    spec = parse_spec(line)
    assert (spec.rate, spec.burstiness, spec.requests, spec.duration, spec.seed) == (2.5, 0.25, 50, 60.0, 7)
    assert spec.models == (("a", 0.75), ("b", 0.25))
    assert (spec.tenants, spec.priorities) == ((("x", 0.25), ("y", 0.75)), (("0", 0.9), ("-1", 0.1)))
    assert (spec.output, spec.cap, spec.max_input, spec.lengths) == ("forced", 64, 100, "N(480,240)/(300,150)")
    assert spec.text == line


def test_a_line_of_a_trace() -> None:
    spec = parse_spec("trace=a.csv time_scale=0.5 input_scale=2 output_scale=3 models=a,b alpha=0.9")
    assert (spec.trace, spec.time_scale, spec.input_scale, spec.output_scale) == ("a.csv", 0.5, 2.0, 3.0)
    assert (spec.rate, spec.requests, spec.alpha) == (None, None, 0.9)


@pytest.mark.parametrize(("chat", "is_chat"), [("", False), ("chat=no", False), ("chat=yes", True)])
def test_a_line_of_prompts(chat: str, is_chat: bool) -> None:
    spec = parse_spec(f"rate=1 prompts=p.jsonl requests=3 {chat}")
    assert (spec.prompts, spec.chat, spec.output) == ("p.jsonl", is_chat, None)


def test_the_order_of_the_settings_does_not_matter() -> None:
    words = ["rate=4", "lengths=D(10,5)", "requests=3", "seed=9"]
    one, other = parse_spec(" ".join(words)), parse_spec("  ".join(reversed(words)))
    assert {f.name for f in fields(Spec) if getattr(one, f.name) != getattr(other, f.name)} == {"text"}


def test_a_path_may_have_spaces() -> None:
    assert parse_spec("trace='my traces/a.csv' time_scale=0.5").trace == "my traces/a.csv"


def test_a_rate_and_a_burstiness_may_be_infinite() -> None:
    assert parse_spec("rate=inf lengths=D(1,1) requests=2").rate == math.inf
    assert parse_spec(f"{GOOD} burstiness=inf").burstiness == math.inf


def test_the_help_describes_every_setting() -> None:
    assert [field.name for field in fields(Spec) if field.name != "text" and f"{field.name}=" not in HELP] == []


NAMES = st.lists(st.text("abc-/.", min_size=1, max_size=5), min_size=1, max_size=6, unique=True)


@given(NAMES, st.data())
def test_shares_are_in_proportion_to_the_weights_and_add_up_to_one(names: list[str], data: st.DataObject) -> None:
    weights = [data.draw(st.integers(1, 1000)) for _ in names]
    line = ",".join(f"{name}:{weight}" for name, weight in zip(names, weights, strict=True))
    shares = parse_spec(f"{GOOD} models={line}").models
    assert [name for name, _ in shares] == names
    assert [share for _, share in shares] == pytest.approx([weight / sum(weights) for weight in weights])
    assert sum(share for _, share in shares) == pytest.approx(1)


@pytest.mark.parametrize("priority", ["0", "-1", "2147483647", "-2147483648"])
def test_a_priority_has_32_bits(priority: str) -> None:
    assert parse_spec(f"{GOOD} priorities={priority}").priorities == ((priority, 1.0),)


@pytest.mark.parametrize("priority", ["2147483648", "-2147483649", "high", "1.5", "--5", "²", "-", "9" * 5000])
def test_a_priority_that_does_not_fit_is_refused(priority: str) -> None:
    with pytest.raises(
        ConfigError, match=re.escape(f"{quoted(priority)} is not a priority: a whole number of 32 bits")
    ):
        parse_spec(f"{GOOD} priorities={priority}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "needs rate=R .* or trace=FILE"),
        ("rate=4 requests=1", "needs lengths=..., prompts=FILE or trace"),
        ("rate=4 lengths=D(1,1)", "needs requests=N or duration=S"),
        ("rate=inf lengths=D(1,1) duration=5", "rate=inf needs requests"),
        ("rate=-1 lengths=D(1,1) requests=1", "rate=-1: must be at least 0"),
        ("rate=0 lengths=D(1,1) requests=1", "rate=0: must be more than 0"),
        ("rate=nan lengths=D(1,1) requests=1", "rate=nan: must be at least 0"),
        ("rate=fast lengths=D(1,1) requests=1", "rate=fast: is not a number"),
        (f"{GOOD} rate=5", "rate is given twice"),
        (f"{GOOD} color=red", "'color=red' is not a setting; the settings are:\nrate=R"),
        (f"{GOOD} seed", "'seed' is not a setting"),
        (f"{GOOD} seed=-1", "seed=-1: must be at least 0"),
        (f"{GOOD} seed=", "seed=: is not a whole number"),
        ("rate=1 lengths=D(1,1) requests=1.5", "requests=1.5: is not a whole number"),
        ("rate=1 lengths=D(1,1) requests=0", "requests=0: must be at least 1"),
        ("rate=1 lengths=D(1,1) duration=0", "duration=0: must be more than 0"),
        ("rate=1 lengths=D(1,1) duration=inf", "duration=inf: must be finite"),
        ("trace=", "trace=: needs a value"),
        ("rate=1 requests=1 prompts=", "prompts=: needs a value"),
        ("rate=1 requests=1 lengths=", "lengths=: needs a value"),
        (f"{GOOD} burstiness=0", "burstiness=0: must be more than 0"),
        (f"{GOOD} cap=0", "cap=0: must be at least 1"),
        (f"{GOOD} output=long", "output=long: must be one of: natural, forced"),
        (f"{GOOD} chat=maybe", "chat=maybe: must be one of: yes, no"),
        (f"{GOOD} models=a,a", "models=a,a: must be names, each once"),
        (f"{GOOD} models=a,", "models=a,: must be names, each once"),
        (f"{GOOD} models=a:-1", "models=a:-1: must be at least 0"),
        (f"{GOOD} models=a:inf", "models=a:inf: must be finite"),
        (f"{GOOD} tenants=a:x", "tenants=a:x: is not a number"),
        (f"{GOOD} alpha=1", "alpha=... needs models"),
        (f"{GOOD} prompts=x.jsonl", "not both"),
        (f"{GOOD} chat=yes", "chat=yes needs prompts"),
        (f"{GOOD} time_scale=2", "time_scale needs trace=FILE"),
        (f"{GOOD} input_scale=2", "input_scale needs trace=FILE"),
        (f"{GOOD} output_scale=2", "output_scale needs trace=FILE"),
        ("rate=inf lengths=D(1,1) requests=1 burstiness=2", "burstiness needs a finite rate"),
        ("trace=a.csv rate=2", "leave out rate and lengths"),
        ("trace=a.csv lengths=D(1,1)", "leave out rate and lengths"),
        ("trace=a.csv burstiness=2", "burstiness needs a finite rate"),
        ("rate=1 prompts=a.jsonl requests=1 max_input=5", "max_input and input_scale apply to random prompts"),
        ("trace=a.csv prompts=a.jsonl input_scale=2", "max_input and input_scale apply to random prompts"),
        ("trace=a.csv prompts=a.jsonl output_scale=2", "output_scale with prompts=FILE needs output=forced"),
        (f"{GOOD} models=a:3,b alpha=1", "alpha=... replaces the weights"),
        ("rate=1 'lengths=D(1,1)", "No closing quotation"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_spec(line)
    assert str(error.value).startswith("workload: ")


@pytest.mark.parametrize(
    "line",
    [
        "trace=a.csv prompts=a.jsonl output_scale=2 output=forced",
        f"{GOOD} models=a:2,b:2 alpha=1",
        "rate=1 lengths=D(1,1) duration=5 requests=3",
        "trace=a.csv duration=5 requests=3 max_input=7",
    ],
)
def test_settings_that_go_together_are_accepted(line: str) -> None:
    assert parse_spec(line).text == line
