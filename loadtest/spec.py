"""A workload as one line of text: `rate=4 lengths=N(480,240)/(300,150) requests=500 seed=1`. Pure."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

from muxmesh.errors import ConfigError

Shares = tuple[tuple[str, float], ...]
"""Names and what part of the requests each gets; the parts add up to 1."""

HELP = """\
rate=R              requests per second; inf: all at once
burstiness=B        of the arrivals: 1 is Poisson (the default), less is burstier, inf is one every 1/R seconds
trace=FILE          arrivals and lengths from a trace (Azure .csv, Mooncake or plain .jsonl, .gz too); no rate then
lengths=DIST        D(2000,200), N(480,240)/(300,150), U(10,20)/(5,9), E(480)/(300) or a CSV file: prompt and answer
prompts=FILE        texts from a .jsonl with "prompt" (and "output_tokens" or "n_out", if answers are forced)
chat=yes|no         prompts are turns of a user and go through the model's chat template (default no)
output=natural|forced  until the model ends, or exactly as long as planned (default: natural with prompts, else forced)
cap=N               longest answer, in tokens (default: 1024, if answers are not forced)
requests=N          at most so many; duration=S: none arrives later than that
models=a,b:3,c      which models, with weights; alpha=A: weights rank**-A instead. With a trace that names models,
                    the most used one there is the first here, and so on
tenants=x:3,y       parts of the requests by tenant; priorities=0:9,-1 by priority (lower is sooner)
time_scale=X        times of a trace, multiplied; input_scale=X, output_scale=X: its lengths; max_input=N
seed=N              of everything that is drawn (default 0)"""


@dataclass(frozen=True, slots=True)
class Spec:
    """What the line says. ``text`` is the line itself."""

    text: str = ""
    rate: float | None = None
    burstiness: float = 1.0
    trace: str | None = None
    lengths: str | None = None
    prompts: str | None = None
    chat: bool = False
    output: Literal["natural", "forced"] | None = None
    cap: int | None = None
    requests: int | None = None
    duration: float | None = None
    models: Shares = ()
    alpha: float | None = None
    tenants: Shares = ()
    priorities: Shares = ()
    time_scale: float = 1.0
    input_scale: float = 1.0
    output_scale: float = 1.0
    max_input: int | None = None
    seed: int = 0


def parse_spec(text: str) -> Spec:
    """Reads the line. Raises ConfigError that names the key and what would be right."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"workload: {error}") from error
    values: dict[str, object] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in _PARSERS or not equals:
            raise ConfigError(f"workload: {word!r} is no setting; these are:\n{HELP}")
        if name in values:
            raise ConfigError(f"workload: {name} is given twice")
        try:
            values[name] = _PARSERS[name](value)
        except ValueError as error:
            raise ConfigError(f"workload: {name}={value}: {error}") from error
    spec = Spec(text=text, **values)  # type: ignore[arg-type] # each parser gives its field's type
    _check(spec)
    return spec


def _check(spec: Spec) -> None:
    if spec.trace is None:
        if spec.rate is None:
            raise ConfigError("workload: needs rate=R (requests per second) or trace=FILE")
        if spec.lengths is None and spec.prompts is None:
            raise ConfigError("workload: needs lengths=..., prompts=FILE or trace=FILE")
        if spec.requests is None and spec.duration is None:
            raise ConfigError("workload: needs requests=N or duration=S, or it would never end")
        if spec.requests is None and spec.rate == math.inf:
            raise ConfigError("workload: rate=inf needs requests=N")
    elif spec.rate is not None or spec.lengths is not None:
        raise ConfigError("workload: a trace has arrivals and lengths of its own; leave out rate and lengths")
    for name in ("time_scale", "input_scale", "output_scale"):
        if spec.trace is None and getattr(spec, name) != 1.0:
            raise ConfigError(f"workload: {name} scales a trace; there is none")
    if spec.burstiness != 1.0 and (spec.rate is None or spec.rate == math.inf):
        raise ConfigError("workload: burstiness is of arrivals at a rate=R that is finite")
    if spec.prompts is not None and (spec.max_input is not None or spec.input_scale != 1.0):
        raise ConfigError("workload: max_input and input_scale are of random prompts; texts have lengths of their own")
    if spec.trace is not None and spec.prompts is not None and spec.output_scale != 1.0 and spec.output != "forced":
        raise ConfigError("workload: output_scale scales a trace's answers; with prompts it needs output=forced")
    if spec.alpha is not None and len({share for _, share in spec.models}) > 1:
        raise ConfigError("workload: models=a:3,b has weights already; leave them or alpha out")
    if spec.lengths is not None and spec.prompts is not None:
        raise ConfigError("workload: lengths=... or prompts=FILE, not both: texts have lengths of their own")
    if spec.alpha is not None and not spec.models:
        raise ConfigError("workload: alpha=... needs models=a,b,...")
    if spec.chat and spec.prompts is None:
        raise ConfigError("workload: chat=yes needs prompts=FILE: there is no conversation in random tokens")


def _at_least(least: float, convert: Callable[[str], float] = float) -> Callable[[str], float]:
    def parse(value: str) -> float:
        try:
            number = convert(value)
        except ValueError:
            raise ValueError("is no number" if convert is float else "is no whole number") from None
        if not number >= least:
            raise ValueError(f"must be at least {least:g}")
        return number

    return parse


def _positive(value: str) -> float:
    number = _at_least(0.0)(value)
    if number == 0:
        raise ValueError("must be more than 0")
    return number


def _finite(value: str) -> float:
    number = _positive(value)
    if math.isinf(number):
        raise ValueError("must be finite")
    return number


def _one_of(*known: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in known:
            raise ValueError(f"one of: {', '.join(known)}")
        return value

    return parse


def _yes(value: str) -> bool:
    return _one_of("yes", "no")(value) == "yes"


def _shares(value: str) -> Shares:
    """`a:3,b` → parts that add up to 1; a name without a number has weight 1."""
    weights: dict[str, float] = {}
    for part in value.split(","):
        name, colon, weight = part.rpartition(":")
        if not colon:
            name, weight = part, "1"
        if not name or name in weights:
            raise ValueError("names, each once, like a:3,b:1")
        weights[name] = _finite(weight)
    total = sum(weights.values())
    return tuple((name, weight / total) for name, weight in weights.items())


def _priorities(value: str) -> Shares:
    shares = _shares(value)
    for name, _ in shares:
        if not (name.lstrip("-").isdigit() and -(1 << 31) <= int(name) < 1 << 31):
            raise ValueError(f"{name!r} is no priority: a whole number, lower is sooner")
    return shares


_PARSERS: dict[str, Callable[[str], object]] = {
    "rate": _positive,
    "burstiness": _positive,
    "trace": str,
    "lengths": str,
    "prompts": str,
    "chat": _yes,
    "output": _one_of("natural", "forced"),
    "cap": _at_least(1, int),
    "requests": _at_least(1, int),
    "duration": _finite,
    "models": _shares,
    "alpha": _at_least(0.0),
    "tenants": _shares,
    "priorities": _priorities,
    "time_scale": _finite,
    "input_scale": _finite,
    "output_scale": _finite,
    "max_input": _at_least(1, int),
    "seed": _at_least(0, int),
}
assert {field.name for field in fields(Spec)} == {"text", *_PARSERS}
