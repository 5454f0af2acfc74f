"""How much of the pool each model can count on. Pure; in slabs, since that is what changes hands between models.

A quota is a claim, not a wall: what its model does not use is lent to the others, and comes back as their requests
end, since a model that is above its quota gets nothing while one below waits (`kvstore.admission`); if that takes
long, its requests give way (`kvstore.unit`). The adaptation is that of MuxServe (Duan et al., 2024, section 3.3): every
few seconds models that use little of their quota give some of it to those that use theirs up and have requests waiting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ADAPT_EVERY_S = 8.0
_ENOUGH = 0.9
"""Share of its quota from which on a model could use more."""
_HEADROOM = 0.95
_LARGEST_GAIN = 0.1
"""Of its quota, for one model in one adaptation."""


@dataclass(frozen=True, slots=True)
class Use:
    """One model since the last adaptation: slabs in use on average, and how many requests wait for it now."""

    mean_slabs: float
    num_waiting: int


def initial_quotas(num_slabs: int, guaranteed: Mapping[str, int]) -> dict[str, int]:
    """What is guaranteed, and an equal part of the rest. All slabs are given out."""
    quotas = dict(guaranteed)
    _share(quotas, dict.fromkeys(guaranteed, num_slabs), num_slabs - sum(guaranteed.values()))
    return quotas


def adapted(quotas: Mapping[str, int], guaranteed: Mapping[str, int], use: Mapping[str, Use]) -> dict[str, int]:
    """The quotas after one adaptation. Their sum stays; no model gets less than it is guaranteed."""
    filled = {model: use[model].mean_slabs / quota if quota else 1.0 for model, quota in quotas.items()}
    wanted = {
        model: max(1, int(quota * _LARGEST_GAIN))
        for model, quota in quotas.items()
        if filled[model] >= _ENOUGH and use[model].num_waiting
    }
    spare = {
        model: min(max(1, int((_HEADROOM - filled[model]) * quota)), quota - guaranteed[model])
        for model, quota in quotas.items()
        if filled[model] < _ENOUGH
    }
    given = min(sum(spare.values()), sum(wanted.values()))
    changed = dict(quotas)
    _share(changed, spare, -given)
    _share(changed, wanted, given)
    return changed


def _share(quotas: dict[str, int], weights: Mapping[str, int], amount: int) -> None:
    """Adds ``amount`` in proportion to ``weights``; the sum is exact, and none gets more than its weight."""
    left, weight_left = amount, sum(weights.values())
    for model, weight in sorted(weights.items()):
        part = round(left * weight / weight_left) if weight_left else 0
        quotas[model] += part
        left, weight_left = left - part, weight_left - weight
