"""SLOs of requests: their targets, whether they were met, and the slack that is left. Pure.

**Targets.** A model has limits in seconds, or a ``scale``: a multiple of the unloaded latency, which is that of a
request that has the device for itself (`UnloadedLatency`). With a scale the TTFT target is scale x prefill, the TPOT
target scale x decode step, and the E2E target scale x (prefill + output tokens x decode step), as in MuxServe (ICML'24,
section 4.1). While the unloaded latency is not known, a request has no targets, and is not counted.

**Slack.** How long a sequence can still wait without a miss: until its next token is due, less the work until then. A
worker's slack is the least of those of its sequences that can still meet their SLO (`muxmesh.engine.urgency`): one that
has missed it gains nothing by going first, and others would miss theirs. Times due are on the clock of the worker.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from muxmesh.types import SloTargets

_CATCH_UP_TOKENS = 8
"""With more, sequences that are lost hold up others when the device is overloaded; with less, those that could recover
are given up too early. Chosen by `benchmarks/shared_device`, floods and tight scales.
"""


class Objective(Protocol):
    """The SLO of a model: `Slo`, or the section `slo` of mesh.yaml."""

    @property
    def ttft_s(self) -> float | None:
        """Longest time to first token; None: no limit."""

    @property
    def tpot_s(self) -> float | None:
        """Longest mean time per token after the first; None: no limit."""

    @property
    def scale(self) -> float | None:
        """The multiple of the unloaded latency; None: the limits are those in seconds."""


@dataclass(frozen=True, slots=True)
class Slo:
    """See `Objective`."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    scale: float | None = None


class UnloadedLatency(Protocol):
    """The latency of a request of one model that has the device for itself, in seconds."""

    def ttft_s(self, num_prompt: int) -> float:
        """Of the prefill of ``num_prompt`` tokens, none of them cached."""

    def tpot_s(self, num_prompt: int, num_output: int = 1) -> float:
        """Mean of a decode step of an output of ``num_output`` tokens."""

    def e2el_s(self, num_prompt: int, num_output: int) -> float:
        """Of the whole request: the prefill, and a decode step for each output token."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which targets a request met. A target that it does not have is met.

    ``e2el`` with a scale is MuxServe's rule. It is weaker than both others together, since a fast prefill makes up for
    slow steps.
    """

    ttft: bool
    tpot: bool
    e2el: bool

    @property
    def met(self) -> bool:
        """Whether the request met its SLO: TTFT and TPOT."""
        return self.ttft and self.tpot


FAILED = Verdict(ttft=False, tpot=False, e2el=False)
"""Of a request that failed or was refused."""


@dataclass(frozen=True, slots=True)
class RequestSlo:
    """What one request is judged by, fixed when it arrives. ``unloaded`` is None with limits in seconds only."""

    config: Objective
    unloaded: UnloadedLatency | None = None

    @staticmethod
    def of(config: Objective | None, unloaded: UnloadedLatency | None) -> RequestSlo | None:
        """None without an SLO, and with a scale whose unloaded latency is not known yet."""
        if config is None or (config.scale is not None and unloaded is None):
            return None
        return RequestSlo(config, unloaded)

    def targets(self, num_prompt: int, num_output: int = 1) -> SloTargets:
        """The targets of a request; with a scale the TPOT target is that of an output of ``num_output`` tokens."""
        config, unloaded = self.config, self.unloaded
        if config.scale is None or unloaded is None:
            return SloTargets(config.ttft_s, config.tpot_s)
        scale = config.scale
        return SloTargets(scale * unloaded.ttft_s(num_prompt), scale * unloaded.tpot_s(num_prompt, num_output))

    def e2el_s(self, num_prompt: int, num_output: int) -> float | None:
        """The E2E target; None if there is only one of a TTFT and a TPOT limit."""
        config = self.config
        if config.scale is not None and self.unloaded is not None:
            return config.scale * self.unloaded.e2el_s(num_prompt, num_output)
        if config.ttft_s is None or config.tpot_s is None:
            return None
        return config.ttft_s + config.tpot_s * max(0, num_output - 1)

    def verdict(self, num_prompt: int, num_output: int, ttft_s: float, tpot_s: float | None, e2el_s: float) -> Verdict:
        """Judges a finished request by its latencies. ``tpot_s``: None for an output of one token, which meets it."""
        targets = self.targets(num_prompt, num_output)
        return Verdict(
            _within(ttft_s, targets.ttft_s),
            _within(tpot_s, targets.tpot_s),
            _within(e2el_s, self.e2el_s(num_prompt, num_output)),
        )


def _within(value_s: float | None, target_s: float | None) -> bool:
    return value_s is None or target_s is None or value_s <= target_s


def first_token_due_s(targets: SloTargets | None, sent_at_s: float) -> float:
    """When the first token is due, if the request reached the worker at ``sent_at_s``; inf without a target."""
    if targets is None or targets.ttft_s is None:
        return math.inf
    return sent_at_s - targets.waited_s + targets.ttft_s


def next_token_due_s(targets: SloTargets | None, since_s: float, num_tokens: int = 1) -> float:
    """When the token ``num_tokens`` after an earlier one is due; inf without a target.

    ``since_s``: when the earlier one was due or, if it is the first, when it was sampled. A sequence may use up what it
    is ahead of its schedule, since the SLO is on the mean of its steps. No token is due if the first token came later
    than the TTFT target: the request has missed its SLO. Else the sequences of a flooded model, all of them late, would
    compete with those that can still meet theirs.
    """
    if targets is None or targets.tpot_s is None or (targets.ttft_s is not None and targets.waited_s > targets.ttft_s):
        return math.inf
    return since_s + targets.tpot_s * num_tokens


def slack_s(due_at_s: float, lost_after_s: float, now_s: float) -> float:
    """Seconds until a token is due, negative if it is late; infinite if it is never due, or later than
    ``lost_after_s`` after that, so that its SLO is missed.
    """
    return due_at_s - now_s if now_s <= due_at_s + lost_after_s else math.inf


def catch_up_s(targets: SloTargets | None) -> float:
    """How late a token after the first may be before its sequence counts as one that misses its SLO.

    A first token that is late is a miss. Faster steps make up for a later one, if it is late by at most the target of
    `_CATCH_UP_TOKENS` tokens.
    """
    return math.inf if targets is None or targets.tpot_s is None else targets.tpot_s * _CATCH_UP_TOKENS
