"""A workload as one line of text: `rate=4 lengths=N(480,240)/(300,150) requests=500 seed=1`. Pure.

It knows which settings exist, their ranges and which exclude each other. It opens no file and samples nothing.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

from muxmesh.errors import ConfigError
from muxmesh.quoting import named, quoted

Shares = tuple[tuple[str, float], ...]
"""(name, share of the requests); the shares add up to 1."""

HELP = """\
rate=R              requests per second; inf: all at once
burstiness=B        burstiness of the arrivals: 1 is Poisson (the default), below 1 is burstier, inf is a fixed interval
trace=FILE          arrivals and lengths of a trace (Azure .csv, Mooncake or plain .jsonl, also .gz); excludes rate
lengths=DIST        prompt and output tokens: D(2000,200), N(480,240)/(300,150), U(10,20)/(5,9), E(480)/(300), CSV file
prompts=FILE        texts from a .jsonl with "prompt" (and "output_tokens" or "n_out", for output=forced)
chat=yes|no         each prompt is a user message, rendered by the model's chat template (default no)
output=natural|forced  the model ends its output, or it has exactly the planned length (default: natural with prompts,
                    else forced)
cap=N               maximum output tokens (default: 1024 for output=natural)
requests=N          at most N requests; duration=S: no request arrives after S seconds
models=a,b:3,c      models and their weights; alpha=A: weights rank**-A instead. If a trace names models, its most
                    used model becomes the first one here, and so on
tenants=x:3,y       tenants and their weights; priorities=0:9,-1 the same for priorities (lower is sooner)
time_scale=X        factor for the times of a trace; input_scale=X, output_scale=X for its lengths; max_input=N: maximum
                    prompt tokens
seed=N              seed of every random choice (default 0)"""


@dataclass(frozen=True, slots=True)
class Spec:
    """The settings of a workload, named as in `HELP`. ``text``: the line itself. None: not given."""

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
    """Parses the line. Raises ConfigError, which names the setting and the values it takes."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"workload: {error}") from error
    values: dict[str, object] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in _PARSERS or not equals:
            raise ConfigError(f"workload: {quoted(word)} is not a setting; the settings are:\n{HELP}")
        if name in values:
            raise ConfigError(f"workload: {name} is given twice")
        try:
            values[name] = _PARSERS[name](value)
        except ValueError as error:
            raise ConfigError(f"workload: {name}={named(value)}: {error}") from error
    spec = Spec(text=text, **values)  # type: ignore[arg-type] # each parser returns the type of its field
    _check(spec)
    return spec


def _check(spec: Spec) -> None:
    if spec.trace is None:
        if spec.rate is None:
            raise ConfigError("workload: needs rate=R (requests per second) or trace=FILE")
        if spec.lengths is None and spec.prompts is None:
            raise ConfigError("workload: needs lengths=..., prompts=FILE or trace=FILE")
        if spec.requests is None and spec.duration is None:
            raise ConfigError("workload: needs requests=N or duration=S to end")
        if spec.requests is None and spec.rate == math.inf:
            raise ConfigError("workload: rate=inf needs requests=N")
    elif spec.rate is not None or spec.lengths is not None:
        raise ConfigError("workload: a trace has its own arrivals and lengths; leave out rate and lengths")
    for name in ("time_scale", "input_scale", "output_scale"):
        if spec.trace is None and getattr(spec, name) != 1.0:
            raise ConfigError(f"workload: {name} needs trace=FILE")
    if spec.burstiness != 1.0 and (spec.rate is None or spec.rate == math.inf):
        raise ConfigError("workload: burstiness needs a finite rate=R")
    if spec.prompts is not None and (spec.max_input is not None or spec.input_scale != 1.0):
        raise ConfigError("workload: max_input and input_scale apply to random prompts; texts have their own lengths")
    if spec.trace is not None and spec.prompts is not None and spec.output_scale != 1.0 and spec.output != "forced":
        raise ConfigError("workload: output_scale with prompts=FILE needs output=forced")
    if spec.alpha is not None and len({share for _, share in spec.models}) > 1:
        raise ConfigError("workload: alpha=... replaces the weights in models=a:3,b; leave one of them out")
    if spec.lengths is not None and spec.prompts is not None:
        raise ConfigError("workload: lengths=... or prompts=FILE, not both: texts have their own lengths")
    if spec.alpha is not None and not spec.models:
        raise ConfigError("workload: alpha=... needs models=a,b,...")
    if spec.chat and spec.prompts is None:
        raise ConfigError("workload: chat=yes needs prompts=FILE: random tokens are not a conversation")


def _at_least(minimum: float, convert: Callable[[str], float] = float) -> Callable[[str], float]:
    def parse(value: str) -> float:
        try:
            number = convert(value)
        except ValueError:
            raise ValueError("is not a number" if convert is float else "is not a whole number") from None
        if not number >= minimum:  # also refuses nan
            raise ValueError(f"must be at least {minimum:g}")
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


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in choices:
            raise ValueError(f"must be one of: {', '.join(choices)}")
        return value

    return parse


def _not_empty(value: str) -> str:
    if not value:
        raise ValueError("needs a value")
    return value


def _yes_or_no(value: str) -> bool:
    return _one_of("yes", "no")(value) == "yes"


def _shares(value: str) -> Shares:
    """`a:3,b` → shares that add up to 1; a name without a number has weight 1."""
    weights: dict[str, float] = {}
    for entry in value.split(","):
        name, colon, weight = entry.rpartition(":")
        if not colon:
            name, weight = entry, "1"
        if not name or name in weights:
            raise ValueError("must be names, each once, with optional weights, like a:3,b:1")
        weights[name] = _finite(weight)
    total = sum(weights.values())
    return tuple((name, weight / total) for name, weight in weights.items())


def _priorities(value: str) -> Shares:
    shares = _shares(value)
    for name, _ in shares:
        if re.fullmatch(r"-?[0-9]{1,10}", name) is None or not -(1 << 31) <= int(name) < 1 << 31:
            raise ValueError(f"{quoted(name)} is not a priority: a whole number of 32 bits, lower is sooner")
    return shares


_PARSERS: dict[str, Callable[[str], object]] = {
    "rate": _positive,
    "burstiness": _positive,
    "trace": _not_empty,
    "lengths": _not_empty,
    "prompts": _not_empty,
    "chat": _yes_or_no,
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
