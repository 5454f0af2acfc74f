"""What one unit serves and how: the input of a replay. Pure.

A case is complete: models, rates, numbers of requests, shares, and the rules of the system that served it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from benchmarks.muxserve.lengths import MAX_TOKENS, Lengths, OutputSpread
from muxmesh.types import ArbiterMode


@dataclass(frozen=True, slots=True)
class ModelCase:
    """One model of a unit and its requests. Shares are in percent, lengths are mean tokens."""

    name: str
    kind: str
    rate: float
    """Requests per second."""
    num_requests: int
    prefill_share: int = 100
    decode_share: int = 100
    max_num_seqs: int = 1024
    mean_prompt: float = 161.0
    mean_output: float = 338.0
    output_spread: OutputSpread = "file"
    longest_output: float = MAX_TOKENS
    duration_s: float | None = None
    """If given, the requests arrive at uniformly random times within it; else with exponential gaps."""
    slo_degree: int = 1
    """Number of devices of the unloaded latency to which SLO scales refer."""

    def requests(self, lengths: Lengths, seed: int) -> list[tuple[float, int, int]]:
        """(arrival in seconds, prompt tokens, output tokens) of each request, the same in every system."""
        random = Random(f"{seed} {self.name}")
        if self.duration_s is None:
            arrivals, now_s = [], 0.0
            for _ in range(self.num_requests):
                now_s += random.expovariate(self.rate)
                arrivals.append(now_s)
        else:
            arrivals = sorted(random.uniform(0.0, self.duration_s) for _ in range(self.num_requests))
        pairs = lengths.sample(
            random, self.num_requests, self.mean_prompt, self.mean_output, self.output_spread, self.longest_output
        )
        return [(at_s, prompt, output) for at_s, (prompt, output) in zip(arrivals, pairs, strict=True)]


@dataclass(frozen=True, slots=True)
class UnitCase:
    """A unit of ``num_devices`` tensor-parallel devices."""

    name: str
    num_devices: int
    models: tuple[ModelCase, ...]
    mode: ArbiterMode = "adbs"
    over_subscription: int = 20
    max_overtakes: int = 1_000_000
    """Of the arbiter. The prototype has no such bound."""
    stall_budget: float = 0.0
    """Of the arbiter. The prototype never lets a decode go first because prefills have held it up for long."""
    strict_order: bool = False
    """Requests are admitted in order of arrival over all models, as MuxServe's temporal baseline does: while the first
    one has to wait for a slot or for memory, so do the others."""
    slo_scale: float | None = None
    """The SLO that every model is configured with, a multiple of the unloaded latency of its mean request."""

    @property
    def num_requests(self) -> int:
        """Of all models."""
        return sum(one.num_requests for one in self.models)


@dataclass(frozen=True, slots=True)
class ModelOutcome:
    """What one model's requests got. Latencies are means in seconds."""

    name: str
    rate: float
    num_requests: int
    throughput: float
    """Completed requests per second, until its last request ended."""
    latency_s: float
    ttft_s: float
    within_slo: Mapping[float, int]
    """SLO scale → number of requests within it."""

    def attainment(self, scale: float) -> float:
        """The part of the requests within an SLO scale, in [0, 1]."""
        return self.within_slo[scale] / self.num_requests
