"""How the token budget of a step is divided among jobs. Pure: knows no sequence, no step and no event.

The scheduler of the engine, the simulator and the step times of a profile share it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from muxmesh.engine.step_limit import LimitedStep, StepLimit
from muxmesh.scheduling_policy import SchedulingPolicy
from muxmesh.types import SchedulingState

_TOKENS_PER_COST = 1024
"""Attention over this many earlier tokens takes about as long as everything else that is computed for one token."""


class Schedulable(Protocol):
    """What `divide_token_budget` reads of a job."""

    @property
    def scheduling(self) -> SchedulingState:
        """The scheduling state of the job's request."""

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose KV is computed."""

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens whose KV is not computed; at least 1."""


_Item = TypeVar("_Item", bound=Schedulable)


def divide_token_budget(
    items: Iterable[_Item],
    policy: SchedulingPolicy,
    now_s: float,
    max_num_seqs: int,
    token_budget: int,
    limit: StepLimit | None = None,
) -> list[tuple[_Item, int]]:
    """Returns the items of the next step, each with its number of tokens to compute.

    Items that need one token go first, all of them up to ``max_num_seqs``. The rest of ``token_budget`` is filled with
    chunks of longer runs, as far as the step ends within ``limit``; the first of them has at least the smallest chunk,
    whatever the limit is. Both are in the order of ``policy`` at ``now_s`` (unix time). A token of a chunk costs more
    the more tokens it attends to, so that a step takes about as long at the end of a long prompt as at its start. At
    least one token is scheduled if there are items.
    """
    ready = sorted(items, key=lambda item: (item.num_uncomputed_tokens > 1, policy.sort_key(item.scheduling, now_s)))
    limited = None if limit is None else LimitedStep(limit, token_budget)
    planned: list[tuple[_Item, int]] = []
    for item in ready[:max_num_seqs]:
        computed, uncomputed = item.num_computed_tokens, item.num_uncomputed_tokens
        cost = 1 + computed // _TOKENS_PER_COST if uncomputed > 1 else 1
        count = min(uncomputed, max(token_budget // cost, 0 if planned else 1))
        if limited is not None and uncomputed > 1:
            count = limited.add_prompt(computed, count, uncomputed)
        elif limited is not None:
            limited.add(computed, count)
        if count == 0:
            break
        planned.append((item, count))
        token_budget -= count * cost
    return planned
