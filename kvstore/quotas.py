"""How much of the pool each model can claim. Pure; in slabs, the unit in which models exchange memory.

A quota is a claim, not a limit. Slabs that a model does not use are lent to the others. They return as requests end,
since a model above its quota gets no memory while an entry of a model below its own waits (`kvstore.admission`). If
that takes long, sequences of the models above their quota are pre-empted (`kvstore.unit`).

Quotas start in proportion to the KV that each model needs a second, where the rates of requests are known, else equal
(MuxServe, Duan et al., 2024, section 3.3). Every few seconds they are adapted, if a model uses all of its quota and has
entries waiting:

    1. It gets back what it had at first, if it has less: from models that have more than at first.
    2. Models that use little of theirs lose what they do not use. Those that wait gain a tenth of their quota each, in
       proportion; what is left over goes to the one with the longest queue (MuxServe's code).

Without 1 a model that was idle for a while would have lost its quota for good to one that always waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

ADAPT_EVERY_S = 2.0
"""A shift in popularity is noticed with this delay. MuxServe has 8 s."""
_FULL = 0.9
"""A model that uses this fraction of its quota or more can gain slabs; one that uses less can lose slabs."""
_HEADROOM = 0.95
"""A model can lose the part of its quota between its use and this fraction, but at least one slab."""
_MAX_GAIN = 0.1
"""A model gains this fraction of its quota in one adaptation, but at least one slab."""


@dataclass(frozen=True, slots=True)
class Use:
    """One model: its mean slabs in use since the last adaptation, and its waiting entries at present."""

    mean_slabs: float
    num_waiting: int


class Quotas:
    """Owns the quotas of a unit's models, and the use that they are adapted to.

    Invariant: the quotas add up to the pool, if there is a model; none is below its guaranteed slabs, but those of
    models that sleep: these are 0, unless all models sleep.
    """

    def __init__(self, num_slabs: int) -> None:
        self.slabs: dict[str, int] = {}
        """Quota of each model."""
        self._num_slabs = num_slabs
        self._guaranteed: dict[str, int] = {}
        self._needs: dict[str, float | None] = {}
        self._initial: dict[str, int] = {}
        self._asleep: set[str] = set()
        self._slab_seconds: dict[str, float] = {}
        self._counted_until_s: float | None = None
        self._adapted_at_s: float | None = None

    def add_model(self, model: str, guaranteed_slabs: int, need: float | None = None) -> None:
        """Adds a model, and resets all quotas. Raises ValueError if more slabs would be guaranteed than there are.

        ``need``: bytes of KV a second, or any number in proportion to it; None: not known.
        """
        guaranteed = sum(self._guaranteed.values()) + guaranteed_slabs
        if guaranteed > self._num_slabs:
            raise ValueError(f"{guaranteed} slabs would be guaranteed; the pool has {self._num_slabs}")
        self._needs[model] = need
        self._reset(self._guaranteed | {model: guaranteed_slabs})

    def remove_model(self, model: str) -> None:
        """Removes a model, and resets all quotas."""
        self._asleep.discard(model)
        self._needs.pop(model, None)
        self._reset({name: slabs for name, slabs in self._guaranteed.items() if name != model})

    def sleep(self, model: str) -> None:
        """Divides the quota of a model that falls asleep among those that are awake, if any is."""
        self._asleep.add(model)
        self._return(model)

    def wake(self, model: str) -> None:
        """Gives a model that wakes its guaranteed slabs, or an equal part of the pool if that is more.

        Less if the others would have to fall below their own guaranteed slabs for it.
        """
        self._asleep.discard(model)
        for other in self._asleep:  # none was awake to get theirs
            self._return(other)
        spare = {other: slabs - self._guaranteed[other] for other, slabs in self._awake().items() if other != model}
        missing = max(self._guaranteed[model], self._num_slabs // (len(spare) + 1)) - self.slabs[model]
        amount = min(missing, sum(spare.values()))
        if amount > 0:
            _distribute(self.slabs, spare, -amount)
            self.slabs[model] += amount

    def _awake(self) -> dict[str, int]:
        """The quotas of the models that are awake."""
        return {model: slabs for model, slabs in self.slabs.items() if model not in self._asleep}

    def _return(self, model: str) -> None:
        awake = {other: slabs + 1 for other, slabs in self._awake().items()}
        if awake:
            slabs, self.slabs[model] = self.slabs[model], 0
            _distribute(self.slabs, awake, slabs)

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
        awake = self._awake()
        use = {model: Use(self._slab_seconds[model] / elapsed_s, num_waiting(model)) for model in awake}
        self.slabs |= adapted(awake, self._guaranteed, use, self._initial)
        self._slab_seconds = dict.fromkeys(self.slabs, 0.0)
        self._adapted_at_s = now_s

    def check_integrity(self) -> None:
        """Proves the invariant. Raises AssertionError."""
        total = sum(self.slabs.values())
        assert not self.slabs or total == self._num_slabs, "quotas do not add up to the pool"
        for model, slabs in self.slabs.items():
            lowest = 0 if model in self._asleep else self._guaranteed[model]
            assert slabs >= lowest, f"the quota of {model} is below its guaranteed slabs"

    def _reset(self, guaranteed: dict[str, int]) -> None:
        self._guaranteed = guaranteed
        self._initial = initial_quotas(self._num_slabs, guaranteed, self._needs)
        self.slabs = dict(self._initial)
        for model in sorted(self._asleep):  # the order decides how parts are rounded
            self._return(model)
        self._slab_seconds = dict.fromkeys(guaranteed, 0.0)
        self._adapted_at_s = self._counted_until_s = None


def initial_quotas(
    num_slabs: int, guaranteed: Mapping[str, int], needs: Mapping[str, float | None] | None = None
) -> dict[str, int]:
    """Each model's guaranteed slabs and a part of the rest. The sum is ``num_slabs``.

    The parts are in proportion to ``needs``, and equal if one of these is not known.
    """
    known = {model: need for model, need in (needs or {}).items() if need is not None}
    weights = known if known.keys() == guaranteed.keys() else dict.fromkeys(guaranteed, 1.0)
    quotas = dict(guaranteed)
    _distribute(quotas, weights, num_slabs - sum(guaranteed.values()))
    return quotas


def adapted(
    quotas: Mapping[str, int],
    guaranteed: Mapping[str, int],
    use: Mapping[str, Use],
    initial: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """The quotas after one adaptation. Their sum stays the same; no quota falls below the guaranteed slabs.

    ``initial``: the quotas at first; None: as they are now.
    """
    waits = {model for model, quota in quotas.items() if _filled(use[model], quota) >= _FULL and use[model].num_waiting}
    changed = dict(quotas)
    if waits:
        _restore_initial(changed, waits, initial or quotas)
        _move_unused(changed, waits, guaranteed, use)
    return changed


def _filled(use: Use, quota: int) -> float:
    return use.mean_slabs / quota if quota else 1.0


def _restore_initial(quotas: dict[str, int], waits: AbstractSet[str], initial: Mapping[str, int]) -> None:
    """Gives the models that wait what they had at first, from those that have more than at first."""
    missing = {model: initial[model] - quotas[model] for model in waits if quotas[model] < initial[model]}
    excess = {model: quota - initial[model] for model, quota in quotas.items() if quota > initial[model]}
    amount = min(sum(missing.values()), sum(excess.values()))
    _distribute(quotas, excess, -amount)
    _distribute(quotas, missing, amount)


def _move_unused(
    quotas: dict[str, int], waits: AbstractSet[str], guaranteed: Mapping[str, int], use: Mapping[str, Use]
) -> None:
    """Moves what models do not use to those that wait."""
    filled = {model: _filled(use[model], quota) for model, quota in quotas.items()}
    wanted = {model: max(1, int(quotas[model] * _MAX_GAIN)) for model in waits}
    spare = {
        model: max(0, min(max(1, int((_HEADROOM - filled[model]) * quota)), quota - guaranteed[model]))
        for model, quota in quotas.items()
        if filled[model] < _FULL and model not in waits
    }
    num_spare = sum(spare.values())
    num_wanted = min(num_spare, sum(wanted.values()))
    _distribute(quotas, spare, -num_spare)
    _distribute(quotas, wanted, num_wanted)
    quotas[max(sorted(waits), key=lambda model: use[model].num_waiting)] += num_spare - num_wanted


def _distribute(quotas: dict[str, int], weights: Mapping[str, float], amount: int) -> None:
    """Adds ``amount`` to ``quotas`` in proportion to ``weights``.

    The parts add up to ``amount`` exactly. No part exceeds its weight if ``amount`` does not exceed their sum.
    """
    left, weight_left = amount, sum(weights.values())
    for model, weight in sorted(weights.items()):
        part = round(left * weight / weight_left) if weight_left else 0
        quotas[model] += part
        left, weight_left = left - part, weight_left - weight
