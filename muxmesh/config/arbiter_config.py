"""The settings of a unit's arbiter, which decides which workers compute on the device, in mesh.yaml.

Knows no device and no worker. `kvstore.arbiter` has the rules.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from muxmesh.config.section import Section
from muxmesh.types import ArbiterMode

MAX_OVERTAKES = 8
MAX_OVERTAKES_WITH_SLOS = 32


class ArbiterConfig(Section):
    """Which workers of a unit compute at the same time, and in which order they get their turns."""

    mode: ArbiterMode = "auto"
    """`adbs`: prefill first, then decodes in turn, as long as the sum of compute shares allows. `fcfs` and `roundrobin`
    fill the device by the same shares: `fcfs` with prefills first, and each role in order of its workers' oldest
    requests, `roundrobin` with all workers in turn. `temporal`: `fcfs` with the whole device for one worker at a time.
    `spatial`: every worker at once, each limited to its share. `auto`: with MPS and all shares at 100 `spatial`;
    without MPS, and with one model that has no SLO, `roundrobin`, so that prompts hardly delay tokens; else `adbs`."""
    over_subscription: int | None = Field(default=None, ge=0, le=100)
    """Percent by which the sum of the shares of computing workers may exceed 100. Unset: 0 on a CPU, 20 on a GPU. On a
    GPU without MPS always 0, as each worker takes all of it."""
    urgent_slack_s: float = Field(default=0.02, ge=0, le=60)
    """With `adbs`: a worker whose next sequence misses its latency target within this time goes before a prefill that
    has more time left. Larger: fewer misses while the unit keeps up. Smaller: fewer at tight SLOs under high load.
    Sequences that have missed it have no precedence, but a decode worker whose sequences have all missed it counts as
    urgent after two repeated grants to others."""
    max_overtakes: int | None = Field(default=None, ge=1, le=1_000_000)
    """A waiting worker goes next after this many repeated grants to others. It bounds how long prefill first,
    priorities, urgency, or older requests of others hold a worker back. Unset: 8, so that a storm of prompts stops no
    stream for long; if models of the unit have SLOs, 32, since these say how long a stream can wait."""
    max_stall_s: float = Field(default=0.5, ge=0.001, le=3600)
    """With `adbs` and `roundrobin`: longest time for which prefill steps hold up a decode worker that waits. After it
    the decode worker computes one step, with `adbs` within `stall_budget`. No prefill step is planned to take longer,
    and one that would is cut, if the pieces of its prompt are not too small. With an SLO the next token may be due
    sooner, and that holds. Smaller: more even gaps between tokens. Larger: prompts are computed sooner."""
    stall_budget: float = Field(default=0.1, ge=0, le=1)
    """With `adbs`: the part of the device's time that decode steps may take that go before prefills only for
    `max_stall_s`, as such steps have small batches. When it is used up, a decode worker waits for longer; the metric
    `muxmesh_decodes_held_up_total` counts that. 0: `max_stall_s` changes no order; 1: it always holds."""
    longest_grant_s: float = Field(default=10, ge=0.01, le=86400)
    """If a worker does not return its grant within this time after the arbiter recalled it, the grant is revoked: its
    share counts as free, and the worker gets no other grant before it returns this one. Longer than any step."""
    kill_after_s: float = Field(default=60, gt=0, le=86400)
    """A worker that computes one step for longer than this is killed. At least `longest_grant_s`, except with
    `spatial`, which revokes nothing."""

    @model_validator(mode="after")
    def _a_grant_is_revoked_before_the_kill(self) -> Self:
        if self.mode != "spatial" and self.kill_after_s < self.longest_grant_s:
            raise ValueError(
                f"kill_after_s: is {self.kill_after_s:g}; must be at least longest_grant_s ({self.longest_grant_s:g})"
            )
        return self

    def resolved(
        self, *, is_cuda: bool, uses_mps: bool, has_limits: bool, has_slos: bool, num_models: int
    ) -> ArbiterConfig:
        """With nothing left open. ``has_limits``: a worker's share is below 100. ``has_slos``: a model has an SLO."""
        mode, over, overtakes = self.mode, self.over_subscription, self.max_overtakes
        if mode == "auto" and uses_mps and not has_limits:
            mode = "spatial"
        elif mode == "auto":
            mode = "roundrobin" if num_models == 1 and not has_slos and not uses_mps else "adbs"
        if is_cuda and not uses_mps:
            over = 0
        elif over is None:
            over = 20 if is_cuda else 0
        if overtakes is None:
            overtakes = MAX_OVERTAKES_WITH_SLOS if has_slos else MAX_OVERTAKES
        return self.model_copy(update={"mode": mode, "over_subscription": over, "max_overtakes": overtakes})
