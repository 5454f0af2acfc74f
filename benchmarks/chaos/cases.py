"""The requests of the load: what they ask for, and how their clients behave. Pure; everything is sampled from a seed.

A case is what determines an output, so that its output is computed once, before the faults. A request is one use of a
case, with what must not change the output: salt, priority, hints, and a client that cancels or has no patience.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from muxmesh.client import Message, Prompt

_WORDS = ("fox", "sea", "lamp", "träume", "你好", "seven", "🎉", "bread", "of", "and", "1984", "quick", "the")


@dataclass(frozen=True, slots=True)
class Case:
    """``options``: those of `MeshClient.stream` that determine the output."""

    number: int
    kind: str
    model: str
    prompt: Prompt
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """One use of a case. ``options`` leave the output as it is.

    ``cancel_after_s``: the client closes the stream then. ``timeout_s``: the deadline that the request asks for.
    ``pause_s``: how long the client waits before it.
    """

    case: Case
    options: dict[str, Any] = field(default_factory=dict)
    cancel_after_s: float | None = None
    timeout_s: float | None = None
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LoadKind:
    """A kind of case. ``sample`` returns a prompt and options; `sample_cases` adds the length of the output."""

    name: str
    weight: float
    sample: Callable[[random.Random], tuple[Prompt, dict[str, Any]]]


def _words(rng: random.Random, most: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(1, most)))


def _seeded(rng: random.Random, **options: Any) -> dict[str, Any]:
    return {"temperature": rng.choice((0.7, 1.0, 1.3)), "seed": rng.getrandbits(48), **options}


LOAD_KINDS: tuple[LoadKind, ...] = (
    LoadKind("greedy", 3, lambda rng: (_words(rng, 12), {"temperature": 0})),
    LoadKind("seeded", 4, lambda rng: (_words(rng, 12), _seeded(rng, top_p=0.95))),
    LoadKind("long prompt", 2, lambda rng: (_words(rng, 40), _seeded(rng, top_k=40, max_new_tokens=60))),
    LoadKind("several sequences", 2, lambda rng: (_words(rng, 8), _seeded(rng, num_sequences=rng.randint(2, 4)))),
    LoadKind("stop strings", 3, lambda rng: (_words(rng, 8), _seeded(rng, stop_strings=("e", "Q7", "\x00", "%")))),
    LoadKind("may end", 1, lambda rng: (_words(rng, 8), _seeded(rng, ignore_eos=False, min_new_tokens=1))),
    LoadKind("log-probabilities", 1, lambda rng: (_words(rng, 8), _seeded(rng, logprobs=2, prompt_logprobs=1))),
    LoadKind("penalties", 1, lambda rng: (_words(rng, 8), _seeded(rng, repetition_penalty=1.3, frequency_penalty=0.5))),
    LoadKind("chat", 2, lambda rng: ((Message("user", _words(rng, 12)),), _seeded(rng, min_p=0.02))),
    LoadKind("token ids", 1, lambda rng: ([rng.randrange(3, 259) for _ in range(rng.randint(1, 200))], _seeded(rng))),
)  # fmt: skip
"""To add a kind of load, add a line."""
_LONG_OR_OF_ROUNDING = ("long prompt", "token ids", "log-probabilities")
GPU_LOAD_KINDS: tuple[LoadKind, ...] = (
    *(kind for kind in LOAD_KINDS if kind.name not in _LONG_OR_OF_ROUNDING),
    LoadKind("long prompt", 2, lambda rng: (_words(rng, 22), _seeded(rng, top_k=40))),
    LoadKind("token ids", 1, lambda rng: ([rng.randrange(3, 259) for _ in range(rng.randint(1, 100))], _seeded(rng))),
)
"""For interpreted kernels: prompts are shorter. No log-probabilities: two devices may round their last digits
differently."""


@dataclass(frozen=True, slots=True)
class LoadSize:
    """Size of the load. ``output_tokens``: lengths of outputs, each as likely as the others.

    A call that lasts longer than ``call_limit_s`` is lost. It leaves time for several restarts on a busy machine.
    """

    kinds: tuple[LoadKind, ...]
    num_cases: int
    output_tokens: tuple[int, ...]
    num_clients: int
    call_limit_s: float


FULL_LOAD = LoadSize(LOAD_KINDS, 40, (1, 2, 9, 30, 70, 140, 180, 250, 250), 14, 150.0)
GPU_LOAD = LoadSize(GPU_LOAD_KINDS, 12, (1, 2, 8, 16, 24), 6, 400.0)
"""Small, since a token takes about 50 ms."""


def sample_cases(rng: random.Random, models: Sequence[str], size: LoadSize = FULL_LOAD) -> list[Case]:
    """The cases of a run: each kind at least once, the rest by weight."""
    kinds = size.kinds
    sampled = [*kinds, *rng.choices(kinds, [kind.weight for kind in kinds], k=size.num_cases - len(kinds))]
    return [_case(rng, number, kind, rng.choice(models), size) for number, kind in enumerate(sampled)]


def requests_of_client(rng: random.Random, cases: Sequence[Case]) -> Iterator[Request]:
    """What one client sends, one request after the other, without an end."""
    while True:
        options: dict[str, Any] = {
            "cache_salt": rng.choice(("", "", "first tenant", "second tenant")),
            "priority": rng.choice((0, 0, 0, -1, 2)),
            "bypass_prefix_cache": rng.random() < 0.15,
        }
        if rng.random() < 0.1:
            options["expected_output_tokens"] = rng.choice((1, 50, 100_000))
        behaviour = rng.random()
        yield Request(
            case=rng.choice(cases),
            options=options,
            cancel_after_s=rng.uniform(0.01, 2.0) if behaviour < 0.12 else None,
            timeout_s=rng.uniform(0.05, 3.0) if behaviour > 0.92 else None,
            pause_s=rng.choice((0.0, 0.0, rng.uniform(0.0, 0.5))),
        )


def _case(rng: random.Random, number: int, kind: LoadKind, model: str, size: LoadSize) -> Case:
    prompt, options = kind.sample(rng)
    length = {"max_new_tokens": rng.choice(size.output_tokens), "ignore_eos": True}
    return Case(number, kind.name, model, prompt, {**length, **options})
