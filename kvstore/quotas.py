"""How much of the pool each model can claim. Pure; in slabs, the unit in which models exchange memory.

A quota is a claim, not a limit. Slabs that a model does not use are lent to the others. They return as requests end,
since a model above its quota gets no memory while an entry of a model below its own waits (`kvstore.admission`). If
that takes long, sequences of the models above their quota are pre-empted (`kvstore.unit`).

The adaptation is that of MuxServe (Duan et al., 2024, section 3.3): every few seconds, models that use little of their
quota lose slabs to models that use all of theirs and have entries waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

ADAPT_EVERY_S = 8.0
_FULL = 0.9
"""A model that uses this fraction of its quota or more can gain slabs; one that uses less can lose slabs."""
_HEADROOM = 0.95
"""A model can lose the part of its quota between its use and this fraction, but at least one slab."""
_MAX_GAIN = 0.1
"""A model gains at most this fraction of its quota in one adaptation, but at least one slab."""


@dataclass(frozen=True, slots=True)
class Use:
    """One model: its mean slabs in use since the last adaptation, and its waiting entries at present."""

    mean_slabs: float
    num_waiting: int


class Quotas:
    """Owns the quotas of a unit's models, and the use that they are adapted to.

    Invariant: the quotas add up to the pool, if there is a model; none is below its guaranteed slabs.
    """

    def __init__(self, num_slabs: int) -> None:
        self.slabs: dict[str, int] = {}
        """Quota of each model."""
        self._num_slabs = num_slabs
        self._guaranteed: dict[str, int] = {}
        self._slab_seconds: dict[str, float] = {}
        self._counted_until_s: float | None = None
        self._adapted_at_s: float | None = None

    def add_model(self, model: str, guaranteed_slabs: int) -> None:
        """Adds a model, and resets all quotas. Raises ValueError if more slabs would be guaranteed than there are."""
        guaranteed = sum(self._guaranteed.values()) + guaranteed_slabs
        if guaranteed > self._num_slabs:
            raise ValueError(f"{guaranteed} slabs would be guaranteed; the pool has {self._num_slabs}")
        self._reset(self._guaranteed | {model: guaranteed_slabs})

    def remove_model(self, model: str) -> None:
        """Removes a model, and resets all quotas."""
        self._reset({name: slabs for name, slabs in self._guaranteed.items() if name != model})

    def count_use(self, now_s: float, num_used: Callable[[str], int]) -> None:
        """Adds slabs in use x seconds since the last call. The present use counts for the whole time since then."""
        if self._counted_until_s is not None:
            for model in self.slabs:
                self._slab_seconds[model] += (now_s - self._counted_until_s) * num_used(model)
        self._counted_until_s = now_s

    def adapt(self, now_s: float, num_waiting: Callable[[str], int]) -> None:
        """Adapts the quotas to the use since the last adaptation, if that is `ADAPT_EVERY_S` ago."""
        if self._adapted_at_s is None:
            self._adapted_at_s = now_s
        elapsed_s = now_s - self._adapted_at_s
        if elapsed_s < ADAPT_EVERY_S:
            return
        use = {model: Use(self._slab_seconds[model] / elapsed_s, num_waiting(model)) for model in self.slabs}
        self.slabs = adapted(self.slabs, self._guaranteed, use)
        self._slab_seconds = dict.fromkeys(self.slabs, 0.0)
        self._adapted_at_s = now_s

    def check_integrity(self) -> None:
        """Proves the invariant. Raises AssertionError."""
        total = sum(self.slabs.values())
        assert not self.slabs or total == self._num_slabs, "quotas do not add up to the pool"
        for model, slabs in self.slabs.items():
            assert slabs >= self._guaranteed[model], f"the quota of {model} is below its guaranteed slabs"

    def _reset(self, guaranteed: dict[str, int]) -> None:
        self._guaranteed = guaranteed
        self.slabs = initial_quotas(self._num_slabs, guaranteed)
        self._slab_seconds = dict.fromkeys(guaranteed, 0.0)
        self._adapted_at_s = self._counted_until_s = None


def initial_quotas(num_slabs: int, guaranteed: Mapping[str, int]) -> dict[str, int]:
    """Each model's guaranteed slabs and an equal part of the rest. The sum is ``num_slabs``."""
    quotas = dict(guaranteed)
    _distribute(quotas, dict.fromkeys(guaranteed, num_slabs), num_slabs - sum(guaranteed.values()))
    return quotas


def adapted(quotas: Mapping[str, int], guaranteed: Mapping[str, int], use: Mapping[str, Use]) -> dict[str, int]:
    """The quotas after one adaptation. Their sum stays the same; no quota falls below the guaranteed slabs."""
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
    num_moved = min(sum(spare.values()), sum(wanted.values()))
    changed = dict(quotas)
    _distribute(changed, spare, -num_moved)
    _distribute(changed, wanted, num_moved)
    return changed


def _distribute(quotas: dict[str, int], weights: Mapping[str, int], amount: int) -> None:
    """Adds ``amount`` to ``quotas`` in proportion to ``weights``.

    The parts add up to ``amount`` exactly. No part exceeds its weight if ``amount`` does not exceed their sum.
    """
    left, weight_left = amount, sum(weights.values())
    for model, weight in sorted(weights.items()):
        part = round(left * weight / weight_left) if weight_left else 0
        quotas[model] += part
        left, weight_left = left - part, weight_left - weight
