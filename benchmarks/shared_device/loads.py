"""The requests of several models in one plan: a Poisson process for each, with rates by popularity. Pure.

The model of rank k has a rate proportional to k**-alpha (MuxServe, ICML'24, section 4.1). The prompts, the arrivals and
the seeds of the outputs depend on ``seed`` only, so that every system gets the same requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from loadtest.spec import parse_spec
from loadtest.workload import PlannedRequest, plan

VOCABULARY = range(1000, 30_000)
"""Token ids of random prompts. Every model of `benchmarks.shared_device.models` has them."""


@dataclass(frozen=True, slots=True)
class Stream:
    """The requests of one model. ``content``: prompts and lengths, as settings of a workload line."""

    model: str
    rate: float
    content: str


def popularity(names: Sequence[str], alpha: float) -> dict[str, float]:
    """Model → its share of the requests, the most popular first."""
    weights = [rank**-alpha for rank in range(1, len(names) + 1)]
    return {name: weight / sum(weights) for name, weight in zip(names, weights, strict=True)}


def streams(contents: Mapping[str, str], alpha: float, rate: float) -> list[Stream]:
    """Streams with ``rate`` requests per second together; the first model of ``contents`` is the most popular one."""
    shares = popularity(list(contents), alpha)
    return [Stream(name, rate * shares[name], content) for name, content in contents.items()]


def planned(of: Sequence[Stream], duration_s: float, seed: int, vocabulary: range = VOCABULARY) -> list[PlannedRequest]:
    """The requests of all streams in order of time. No two share a prefix in the cache."""
    found: list[PlannedRequest] = []
    for index, stream in enumerate(of):
        line = f"rate={stream.rate} duration={duration_s} models={stream.model} {stream.content}"
        found += plan(parse_spec(f"{line} seed={seed * len(of) + index}"), vocabulary)
    return numbered(found)


def from_trace(trace: str, models: Sequence[str], settings: str, duration_s: float) -> list[PlannedRequest]:
    """The requests of a trace: its n-th most used model is the n-th of ``models``. Lengths are those of the trace."""
    line = f"trace={trace} models={','.join(models)} duration={duration_s} {settings}"
    return numbered(plan(parse_spec(line), VOCABULARY))


def numbered(requests: Sequence[PlannedRequest]) -> list[PlannedRequest]:
    """The same in order of time, each with its index and a cache salt of its own."""
    ordered = sorted(requests, key=lambda request: request.at_s)
    return [replace(request, index=index, cache_salt=f"r{index}") for index, request in enumerate(ordered)]


def rates_of(requests: Sequence[PlannedRequest], duration_s: float) -> dict[str, float]:
    """Model → requests per second that the plan sends."""
    names = sorted({request.model or "" for request in requests})
    return {name: sum(request.model == name for request in requests) / duration_s for name in names}
