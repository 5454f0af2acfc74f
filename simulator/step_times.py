"""How long the steps of one model take on a share of the device, and how much neighbours slow them down. Pure.

The workers of `simulator.simulated_workers` read step times from here only. `LinearStepTimes` is the sim engine's
linear cost; another source, such as a table of measured times, implements `StepTimes` too. Knows no worker and no time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from muxmesh.config.model_config import SimProfile
from muxmesh.engine.sim_runner import sim_step_cost
from muxmesh.step_cost import StepCost, StepShape, at_share, context_of
from muxmesh.unloaded_latency import Unloaded

Slowdown = Callable[[float], float]
"""How many times as long a step takes beside other workers: of the sum of their shares, which is 0 if none computes."""


class StepTimes(Protocol):
    """Seconds of the steps of one model's workers while no other worker computes. ``share``: in (0, 1]."""

    def prefill_s(self, shape: StepShape, share: float) -> float:
        """Seconds of a prefill step, which computes ``num_tokens`` tokens of ``num_seqs`` prompts."""

    def decode_cost(self, num_seqs: int, share: float) -> tuple[float, float]:
        """``(base_s, per_context_s)``: a decode step of ``num_seqs`` sequences with c tokens of context, summed over
        the sequences, takes ``base_s + per_context_s * c`` seconds.
        """


@dataclass(frozen=True, slots=True)
class LinearStepTimes:
    """Steps of a linear cost. The scalings are those of `muxmesh.step_cost.at_share`, for each role."""

    cost: StepCost
    prefill_scaling: float = 1.0
    decode_scaling: float = 1.0

    @staticmethod
    def of(profile: SimProfile) -> LinearStepTimes:
        """The times of the sim engine with this profile."""
        return LinearStepTimes(sim_step_cost(profile), profile.prefill_scaling, profile.decode_scaling)

    def prefill_s(self, shape: StepShape, share: float) -> float:
        return at_share(self.cost, share, self.prefill_scaling).step_s(shape.num_tokens, shape.num_context)

    def decode_cost(self, num_seqs: int, share: float) -> tuple[float, float]:
        cost = at_share(self.cost, share, self.decode_scaling)
        return cost.step_s(num_seqs, 0), cost.per_context_s


def unloaded_latency(times: StepTimes, chunk: int) -> Unloaded:
    """The latency of a request alone on the whole device, for its SLO. ``chunk``: prompt tokens in a step.

    It is linear: the prefill is fitted to a step of one token, one of ``chunk`` tokens, and one after ``chunk`` others.
    """
    one_s, all_s, later_s = (
        times.prefill_s(shape, 1.0)
        for shape in (
            StepShape(1, 0, 1),
            StepShape(chunk, context_of(0, chunk), 1),
            StepShape(chunk, context_of(chunk, chunk), 1),
        )
    )
    per_context_s = (later_s - all_s) / chunk**2
    per_token_s = (all_s - one_s - per_context_s * context_of(0, chunk)) / max(1, chunk - 1)
    base_s, decode_context_s = times.decode_cost(1, 1.0)
    prefill = StepCost(one_s - per_token_s, per_token_s, per_context_s)
    return Unloaded(prefill, StepCost(base_s, 0.0, decode_context_s), chunk)


def linear_slowdown(contention: float, overhead: float = 1.0) -> Slowdown:
    """Steps take ``overhead * (1 + contention * others)`` times as long.

    Raises ValueError unless ``contention`` is at least 0 and ``overhead`` at least 1.
    """
    if contention < 0 or overhead < 1:
        raise ValueError(f"contention is {contention}, overhead {overhead}; at least 0 and 1 are needed")
    return lambda others: overhead * (1 + contention * others)


def no_slowdown(others: float) -> float:
    """Workers do not slow each other down."""
    return 1.0
