"""Expands a `Spec` into requests: time, prompt, length, model, tenant, priority. One seed determines all of them.

Arrival times, lengths, seeds and names (model, tenant, priority) have random streams of their own: changing one of them
leaves the others as they are.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loadtest.files import read_jsonl
from loadtest.lengths import MAX_TOKENS, parse_lengths
from loadtest.spec import Shares, Spec
from loadtest.traces import MOONCAKE_BLOCK, Arrival, read_trace
from muxmesh.errors import ConfigError
from muxmesh.quoting import quoted

_BYTES_PER_TOKEN = 4
"""Of a text whose tokens were not counted."""
DEFAULT_CAP = 1024
"""Maximum output tokens of a natural output without ``cap``."""


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request to send at ``at_s``, in seconds from the start.

    ``prompt``: text or token ids. ``is_forced``: the output has exactly ``max_new_tokens`` tokens, else at most.
    ``model`` and ``tenant`` are None where the workload names none.
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
    cache_salt: str = ""

    @property
    def sent_salt(self) -> str:
        """The cache salt to send: the tenant's name if none is given."""
        return self.cache_salt or self.tenant or ""


@dataclass(frozen=True, slots=True)
class Body:
    """The content of a request: a text, or ``num_input`` random tokens.

    ``hash_ids``: one per ``hash_tokens`` prompt tokens from the start; equal ids stand for equal tokens.
    ``num_input`` of a text is 0 if its length in tokens is unknown. ``num_output``: the planned output tokens.
    """

    text: str | None
    num_input: int
    num_output: int | None
    hash_ids: tuple[int, ...] = ()
    hash_tokens: int = MOONCAKE_BLOCK
    model: str | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, at least 1; of a text whose tokens were not counted, an estimate."""
        if self.num_input or self.text is None:
            return max(1, self.num_input)
        return max(1, math.ceil(len(self.text.encode()) / _BYTES_PER_TOKEN))


@dataclass(frozen=True, slots=True)
class Sketch:
    """One request without its random tokens, which a simulation does not need. See `PlannedRequest`."""

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
    """Returns all requests in order of time. Raises ConfigError.

    ``vocabulary``: the token ids that random prompts are sampled from.
    """
    tokens = _TokenSource(spec.seed, vocabulary)
    return [
        PlannedRequest(
            index=item.index,
            at_s=item.at_s,
            prompt=tokens.prompt(item.index, item.body) if item.body.text is None else item.body.text,
            is_chat=spec.chat,
            max_new_tokens=item.max_new_tokens,
            is_forced=item.is_forced,
            seed=item.seed,
            model=item.model,
            tenant=item.tenant,
            priority=item.priority,
        )
        for item in sketch(spec)
    ]


def sketch(spec: Spec) -> list[Sketch]:
    """Returns all requests in order of time, without tokens. Raises ConfigError."""
    shares_rng, seeds_rng = random.Random(f"{spec.seed}/who"), random.Random(f"{spec.seed}/seeds")
    arrivals = _from_trace(spec, Path(spec.trace)) if spec.trace else _synthetic(spec)
    timed = list(itertools.islice(arrivals, spec.requests))
    model_of = _model_chooser(spec, [body.model for _, body in timed], shares_rng)
    is_forced = (spec.output or ("natural" if spec.prompts else "forced")) == "forced"
    return [
        Sketch(
            index=index,
            at_s=at_s,
            body=body,
            max_new_tokens=_max_new_tokens(spec, body, is_forced),
            is_forced=is_forced,
            seed=seeds_rng.getrandbits(32),
            model=model_of(body.model),
            tenant=_sample_name(spec.tenants, shares_rng),
            priority=int(_sample_name(spec.priorities, shares_rng) or 0),
        )
        for index, (at_s, body) in enumerate(timed)
    ]


def arrival_times(spec: Spec) -> Iterator[float]:
    """Yields arrival times without end, in seconds, the first at 0.

    A gamma process with ``burstiness`` as its shape, as in `vllm bench serve`.
    """
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
        duration_s = spec.duration
        times = itertools.takewhile(lambda at_s: at_s <= duration_s, times)
    rng = random.Random(f"{spec.seed}/bodies")
    if spec.prompts is not None:
        texts = _read_prompts(Path(spec.prompts))
        rng.shuffle(texts)
        yield from zip(times, itertools.cycle(texts), strict=False)
        return
    assert spec.lengths is not None
    sample_lengths = parse_lengths(spec.lengths)
    for at_s in times:
        num_input, num_output = sample_lengths(rng)
        yield at_s, Body(None, min(num_input, spec.max_input or num_input), num_output)


def _read_prompts(path: Path) -> list[Body]:
    bodies = []
    for number, item in read_jsonl(path):
        prompt, num_output = item.get("prompt"), item.get("output_tokens", item.get("n_out"))
        if not isinstance(prompt, str) or not prompt:
            raise ConfigError(f'{path}: line {number}: needs "prompt", a non-empty text')
        if num_output is not None and (not isinstance(num_output, int) or num_output < 1):
            raise ConfigError(
                f"{path}: line {number}: output_tokens is {quoted(num_output)}; it must be a whole number of at least 1"
            )
        num_input = item.get("input_tokens", item.get("n_in", 0))
        if not isinstance(num_input, int) or num_input < 0:
            raise ConfigError(f"{path}: line {number}: input_tokens is {quoted(num_input)}; it must be a whole number")
        bodies.append(Body(prompt, num_input, num_output))
    if not bodies:
        raise ConfigError(f"{path}: has no prompts")
    return bodies


def _from_trace(spec: Spec, path: Path) -> Iterator[tuple[float, Body]]:
    texts: Iterator[Body] | None = None
    if spec.prompts is not None:
        bodies = _read_prompts(Path(spec.prompts))
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
        num_input=min(num_input, spec.max_input or MAX_TOKENS),
        num_output=min(num_output, MAX_TOKENS),
        hash_ids=arrival.hash_ids,
        hash_tokens=min(max(1, round(MOONCAKE_BLOCK * spec.input_scale)), MAX_TOKENS),
        model=arrival.model,
    )


def _max_new_tokens(spec: Spec, body: Body, is_forced: bool) -> int:
    if not is_forced:
        return spec.cap or DEFAULT_CAP
    if body.num_output is None:
        raise ConfigError(f"{spec.prompts}: output=forced needs output_tokens (or n_out) in every line")
    return min(body.num_output, spec.cap or body.num_output)


class _TokenSource:
    """Random prompts. Prompts with hash ids share a prefix as far as their ids agree."""

    def __init__(self, seed: int, vocabulary: range) -> None:
        self._seed = seed
        self._vocabulary = vocabulary

    def prompt(self, index: int, body: Body) -> tuple[int, ...]:
        blocks = (self._tokens(f"block {hash_id}", body.hash_tokens) for hash_id in body.hash_ids)
        tokens = tuple(itertools.islice(itertools.chain.from_iterable(blocks), body.num_input))
        return tokens + self._tokens(f"prompt {index}", body.num_input - len(tokens))

    def _tokens(self, name: str, count: int) -> tuple[int, ...]:
        return tuple(random.Random(f"{self._seed}/{name}").choices(self._vocabulary, k=count))


def _model_chooser(spec: Spec, named: Sequence[str | None], rng: random.Random) -> Callable[[str | None], str | None]:
    """Returns the function from a trace's model name to the served model.

    The n-th most used name of the trace becomes the n-th model of the spec, round-robin. Without a name the model is
    sampled by weight, or by rank if ``alpha`` is given.
    """
    if not spec.models:
        return lambda name: None
    shares = spec.models
    if spec.alpha is not None:
        weights = [rank**-spec.alpha for rank in range(1, len(shares) + 1)]
        shares = tuple((name, weight / sum(weights)) for (name, _), weight in zip(shares, weights, strict=True))
    by_popularity = [name for name, _ in Counter(name for name in named if name is not None).most_common()]
    of_trace = {name: shares[rank % len(shares)][0] for rank, name in enumerate(by_popularity)}
    return lambda name: of_trace[name] if name is not None else _sample_name(shares, rng)


def _sample_name(shares: Shares, rng: random.Random) -> str | None:
    if not shares:
        return None
    names, weights = zip(*shares, strict=True)
    return str(rng.choices(names, weights)[0])
