"""How many tokens of prompts fit into a step that other workers wait for. Pure: knows no job, no grant and no clock.

A step is never interrupted, so a decode worker that waits for the device waits until the prefill step ends. The grant
says how long that step may take (`kvstore.arbiter`), the worker's fitted step cost how many tokens that are.

Small chunks are expensive: each step has a fixed cost, and on a GPU one of few tokens takes as long as one of some
hundred, which the fit does not know. So a prompt is cut into no piece that is smaller than the smallest chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from muxmesh.step_cost import StepCost, context_of

MIN_CHUNK_TOKENS = 16
MIN_CHUNK_PART = 8
"""The smallest chunk is one part of so many of the token budget, or larger."""
MAX_FIXED_PART = 4
"""Its tokens take this many times as long as the fixed part of its step, or longer."""


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

    def min_tokens(self, token_budget: int) -> int:
        """The smallest chunk, in tokens."""
        base_s, per_token_s = self.cost.base_s, self.cost.per_token_s
        worth_it = math.ceil(MAX_FIXED_PART * base_s / per_token_s) if per_token_s > 0 else 0
        return min(token_budget, max(MIN_CHUNK_TOKENS, token_budget // MIN_CHUNK_PART, worth_it))

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


class LimitedStep:
    """Counts the time of one step while it is planned."""

    def __init__(self, limit: StepLimit, token_budget: int) -> None:
        self._limit = limit.resolved(token_budget)
        self._min_tokens = self._limit.min_tokens(token_budget)
        self._used_s = 0.0
        self._has_prompt = False

    def add(self, start: int, num_tokens: int) -> None:
        """Adds the tokens ``[start, start + num_tokens)`` of a sequence, whatever the limit."""
        self._used_s += self._limit.chunk_s(start, num_tokens)

    def add_prompt(self, start: int, num_tokens: int, num_left: int) -> int:
        """Adds up to ``num_tokens`` of the ``num_left`` tokens that a prompt has from ``start`` on. Returns how many.

        Of the first prompt of a step at least the smallest chunk, so that prompts always progress, or all of
        ``num_tokens`` if what is left of it is less than two such chunks.
        """
        fitting = self._limit.num_tokens(start, self._used_s)
        if fitting < num_tokens:
            least = 0 if self._has_prompt else self._min_tokens
            piece = min(max(int(fitting), least), num_left - self._min_tokens)
            whole = 0 if self._has_prompt else num_tokens
            num_tokens = min(num_tokens, piece) if piece >= self._min_tokens else whole
        self._has_prompt = True
        self.add(start, num_tokens)
        return num_tokens
