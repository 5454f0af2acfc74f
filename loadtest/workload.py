"""From a `Spec` to the requests themselves: who asks what, when, of which model. Everything is drawn from one seed."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loadtest.files import read_jsonl
from loadtest.lengths import parse_lengths
from loadtest.spec import Shares, Spec
from loadtest.traces import MOONCAKE_BLOCK, Arrival, read_trace
from muxmesh.errors import ConfigError

DEFAULT_CAP = 1024
"""Longest answer where nothing else is said, in tokens."""


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request, before it is sent. ``prompt``: text, or token ids. ``is_forced``: the answer has exactly
    ``max_new_tokens`` tokens; else at most. ``model`` and ``tenant`` None: not said.
    """

    index: int
    at_s: float
    prompt: str | tuple[int, ...]
    is_chat: bool
    max_new_tokens: int
    is_forced: bool
    seed: int
    model: str | None = None
    tenant: str | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Body:
    """What a request says: a text, or a number of tokens, the first of which are named by hash ids, each for so many.

    ``num_output``: how long its answer is meant to be. ``num_input`` of a text is 0 if nobody said it.
    """

    text: str | None
    num_input: int
    num_output: int | None
    hash_ids: tuple[int, ...] = ()
    hash_tokens: int = MOONCAKE_BLOCK
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Sketch:
    """One request without its random tokens: all that a simulation needs. See `PlannedRequest`."""

    index: int
    at_s: float
    body: Body
    max_new_tokens: int
    is_forced: bool
    seed: int
    model: str | None
    tenant: str | None
    priority: int


def plan(spec: Spec, vocabulary: range) -> list[PlannedRequest]:
    """All requests in order of time. ``vocabulary``: the token ids of which random prompts are made.

    Raises ConfigError.
    """
    tokens = _TokenSource(spec.seed, vocabulary)
    return [
        PlannedRequest(
            index=one.index,
            at_s=one.at_s,
            prompt=tokens.prompt(one.index, one.body) if one.body.text is None else one.body.text,
            is_chat=spec.chat,
            max_new_tokens=one.max_new_tokens,
            is_forced=one.is_forced,
            seed=one.seed,
            model=one.model,
            tenant=one.tenant,
            priority=one.priority,
        )
        for one in sketch(spec)
    ]


def sketch(spec: Spec) -> list[Sketch]:
    """All requests in order of time, without tokens. Raises ConfigError."""
    who, seeds = random.Random(f"{spec.seed}/who"), random.Random(f"{spec.seed}/seeds")
    timed = list(itertools.islice(_trace(spec, Path(spec.trace)) if spec.trace else _synthetic(spec), spec.requests))
    if not timed:
        raise ConfigError(f"workload: no request arrives within duration={spec.duration}")
    model_of = _model_chooser(spec, [body.model for _, body in timed], who)
    is_forced = (spec.output or ("natural" if spec.prompts else "forced")) == "forced"
    return [
        Sketch(
            index=index,
            at_s=at_s,
            body=body,
            max_new_tokens=_most_tokens(spec, body, is_forced),
            is_forced=is_forced,
            seed=seeds.getrandbits(32),
            model=model_of(body.model),
            tenant=_chosen(spec.tenants, who),
            priority=int(_chosen(spec.priorities, who) or 0),
        )
        for index, (at_s, body) in enumerate(timed)
    ]


def arrival_times(spec: Spec) -> Iterator[float]:
    """Seconds from the start, for ever: a gamma process, as in `vllm bench serve` (burstiness is its shape)."""
    assert spec.rate is not None
    rng = random.Random(f"{spec.seed}/arrivals")
    at_s = 0.0
    while True:
        yield at_s
        if math.isinf(spec.burstiness) or math.isinf(spec.rate):
            at_s += 1 / spec.rate
        else:
            at_s += rng.gammavariate(spec.burstiness, 1 / (spec.rate * spec.burstiness))


def _synthetic(spec: Spec) -> Iterator[tuple[float, Body]]:
    times: Iterator[float] = arrival_times(spec)
    if spec.duration is not None:
        within_s = spec.duration
        times = itertools.takewhile(lambda at_s: at_s <= within_s, times)
    rng = random.Random(f"{spec.seed}/bodies")
    if spec.prompts is not None:
        texts = _texts(Path(spec.prompts))
        rng.shuffle(texts)
        yield from zip(times, itertools.cycle(texts), strict=False)
        return
    assert spec.lengths is not None
    draw = parse_lengths(spec.lengths)
    for at_s in times:
        num_input, num_output = draw(rng)
        yield at_s, Body(None, min(num_input, spec.max_input or num_input), num_output)


def _texts(path: Path) -> list[Body]:
    bodies = []
    for number, item in read_jsonl(path):
        prompt, num_output = item.get("prompt"), item.get("output_tokens", item.get("n_out"))
        if not isinstance(prompt, str) or not prompt:
            raise ConfigError(f'{path}: line {number}: needs "prompt", a text')
        if num_output is not None and (not isinstance(num_output, int) or num_output < 1):
            raise ConfigError(f"{path}: line {number}: output_tokens is {num_output!r}; a whole number of at least 1")
        num_input = item.get("input_tokens", item.get("n_in", 0))
        if not isinstance(num_input, int) or num_input < 0:
            raise ConfigError(f"{path}: line {number}: input_tokens is {num_input!r}; a whole number")
        bodies.append(Body(prompt, num_input, num_output))
    if not bodies:
        raise ConfigError(f"{path}: has no prompts")
    return bodies


def _trace(spec: Spec, path: Path) -> Iterator[tuple[float, Body]]:
    texts: Iterator[Body] | None = None
    if spec.prompts is not None:
        bodies = _texts(Path(spec.prompts))
        random.Random(f"{spec.seed}/bodies").shuffle(bodies)
        texts = itertools.cycle(bodies)
    for arrival in read_trace(path):
        at_s = arrival.at_s * spec.time_scale
        if spec.duration is not None and at_s > spec.duration:
            return
        body = _scaled(spec, arrival)
        yield at_s, body if texts is None else replace(body, text=next(texts).text)


def _scaled(spec: Spec, arrival: Arrival) -> Body:
    num_input = max(1, round(arrival.num_input * spec.input_scale))
    num_output = max(1, round(arrival.num_output * spec.output_scale))
    return Body(
        text=None,
        num_input=min(num_input, spec.max_input or num_input),
        num_output=num_output,
        hash_ids=arrival.hash_ids,
        hash_tokens=max(1, round(MOONCAKE_BLOCK * spec.input_scale)),
        model=arrival.model,
    )


def _most_tokens(spec: Spec, body: Body, is_forced: bool) -> int:
    if not is_forced:
        return spec.cap or DEFAULT_CAP
    if body.num_output is None:
        raise ConfigError(f"{spec.prompts}: output=forced needs output_tokens (or n_out) in every line")
    return min(body.num_output, spec.cap or body.num_output)


class _TokenSource:
    """Random prompts. Those of a trace with hash ids begin alike where their ids do."""

    def __init__(self, seed: int, vocabulary: range) -> None:
        self._seed = seed
        self._vocabulary = vocabulary

    def prompt(self, index: int, body: Body) -> tuple[int, ...]:
        blocks = (self._tokens(f"block {one}", body.hash_tokens) for one in body.hash_ids)
        tokens = tuple(itertools.islice(itertools.chain.from_iterable(blocks), body.num_input))
        return tokens + self._tokens(f"prompt {index}", body.num_input - len(tokens))

    def _tokens(self, name: str, count: int) -> tuple[int, ...]:
        return tuple(random.Random(f"{self._seed}/{name}").choices(self._vocabulary, k=count))


def _model_chooser(spec: Spec, named: Sequence[str | None], rng: random.Random) -> Callable[[str | None], str | None]:
    """Which model a request goes to: by weight, by rank, or by the place of the trace's own name in its popularity."""
    if not spec.models:
        return lambda name: None
    shares = spec.models
    if spec.alpha is not None:
        weights = [rank**-spec.alpha for rank in range(1, len(shares) + 1)]
        shares = tuple((name, weight / sum(weights)) for (name, _), weight in zip(shares, weights, strict=True))
    by_use = [name for name, _ in Counter(name for name in named if name is not None).most_common()]
    of_trace = {name: shares[place % len(shares)][0] for place, name in enumerate(by_use)}
    return lambda name: of_trace[name] if name is not None else _chosen(shares, rng)


def _chosen(shares: Shares, rng: random.Random) -> str | None:
    if not shares:
        return None
    names, weights = zip(*shares, strict=True)
    return str(rng.choices(names, weights)[0])
