"""How many tokens of prompts fit into a step that other workers wait for. Pure: knows no job, no grant and no clock.

A step is never interrupted, so a decode worker that waits for the device waits until the prefill step ends. The grant
says how long that step may take (`kvstore.arbiter`), the worker's fitted step cost how many tokens that are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from muxmesh.step_cost import StepCost, context_of

MIN_CHUNK_TOKENS = 16
"""A step with prompts computes at least this many of their tokens, so that prompts always progress."""


@dataclass(frozen=True, slots=True)
class StepLimit:
    """``longest_s``: how long a step with prompts may take, in seconds; not positive if it is late already. ``cost``:
    of the worker's steps.
    """

    cost: StepCost
    longest_s: float

    def resolved(self, token_budget: int) -> StepLimit:
        """With a cost for each token, if the fit has none: it has seen steps of ``token_budget`` tokens only."""
        cost = self.cost
        if cost.per_token_s > 0:
            return self
        return replace(self, cost=replace(cost, base_s=0.0, per_token_s=cost.base_s / token_budget))

    @property
    def min_tokens(self) -> int:
        """The smallest chunk, in tokens: it takes as long as what a step costs without any, or longer."""
        cost = self.cost
        return max(MIN_CHUNK_TOKENS, math.ceil(cost.base_s / cost.per_token_s) if cost.per_token_s > 0 else 0)

    def chunk_s(self, start: int, num_tokens: int) -> float:
        """Seconds that the tokens ``[start, start + num_tokens)`` of a sequence add to a step."""
        return self.cost.per_token_s * num_tokens + self.cost.per_context_s * context_of(start, num_tokens)

    def num_tokens(self, start: int, used_s: float) -> float:
        """The most tokens from ``start`` on that a step takes in time if the others in it take ``used_s`` seconds.

        Not rounded; infinite if tokens cost nothing.
        """
        left_s = self.longest_s - self.cost.base_s - used_s
        if left_s <= 0:
            return 0.0
        curve = self.cost.per_context_s
        slope = self.cost.per_token_s + curve * (start - 0.5)
        divisor = slope + math.sqrt(slope * slope + 2 * curve * left_s)
        return 2 * left_s / divisor if divisor > 0 else math.inf
