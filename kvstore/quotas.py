"""How much of the pool each model can claim. Pure; in slabs, the unit in which models exchange memory.

A quota is a claim, not a limit: what its model does not use is lent to the others, and returns as their requests end,
since a model above its quota gets nothing while one below waits (`kvstore.admission`); if that takes long, its
sequences are pre-empted (`kvstore.unit`). The adaptation is that of MuxServe (Duan et al., 2024, section 3.3): every
few seconds, models that use little of their quota give some of it to models that use all of theirs and have requests
waiting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ADAPT_EVERY_S = 8.0
_FULL = 0.9
"""Fraction of its quota from which on a model could use more."""
_HEADROOM = 0.95
_MAX_GAIN = 0.1
"""Fraction of its quota that a model gains in one adaptation, at most."""


@dataclass(frozen=True, slots=True)
class Use:
    """One model since the last adaptation: mean slabs in use, and requests that wait for it now."""

    mean_slabs: float
    num_waiting: int


def initial_quotas(num_slabs: int, guaranteed: Mapping[str, int]) -> dict[str, int]:
    """What is guaranteed, and an equal part of the rest. The sum is ``num_slabs``."""
    quotas = dict(guaranteed)
    _distribute(quotas, dict.fromkeys(guaranteed, num_slabs), num_slabs - sum(guaranteed.values()))
    return quotas


def adapted(quotas: Mapping[str, int], guaranteed: Mapping[str, int], use: Mapping[str, Use]) -> dict[str, int]:
    """The quotas after one adaptation. Their sum stays; no model gets less than it is guaranteed."""
    filled = {model: use[model].mean_slabs / quota if quota else 1.0 for model, quota in quotas.items()}
    wanted = {
        model: max(1, int(quota * _MAX_GAIN))
        for model, quota in quotas.items()
        if filled[model] >= _FULL and use[model].num_waiting
    }
    spare = {
        model: min(max(1, int((_HEADROOM - filled[model]) * quota)), quota - guaranteed[model])
        for model, quota in quotas.items()
        if filled[model] < _FULL
    }
    given = min(sum(spare.values()), sum(wanted.values()))
    changed = dict(quotas)
    _distribute(changed, spare, -given)
    _distribute(changed, wanted, given)
    return changed


def _distribute(quotas: dict[str, int], weights: Mapping[str, int], amount: int) -> None:
    """Adds ``amount`` in proportion to ``weights``; the sum is exact, and no part exceeds its weight."""
    left, weight_left = amount, sum(weights.values())
    for model, weight in sorted(weights.items()):
        part = round(left * weight / weight_left) if weight_left else 0
        quotas[model] += part
        left, weight_left = left - part, weight_left - weight
