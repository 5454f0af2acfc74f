"""The best plan that can be made of given units, found exactly. Pure; knows neither shares nor estimates.

Dynamic programming over sets of models: in the order of models, each unit extends every set that has all models before
the unit's first one and none of its own. A table has a value for each set and number of devices, so it is for few
models; `search` is for many.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from muxmesh.placement.unit_moves import Unit

MAX_MODELS = 20


def best_partition(
    units: Sequence[Unit], values: Sequence[float], num_models: int, num_devices: int
) -> list[int] | None:
    """The indices of ``units`` that have every model once, on at most ``num_devices``, with the largest sum of values.

    None: no such units have all models. Raises ValueError for more than `MAX_MODELS` models.
    """
    if num_models > MAX_MODELS:
        raise ValueError(f"num_models: is {num_models}; at most {MAX_MODELS} are possible")
    alike: dict[Unit, int] = {}
    for index, unit in enumerate(units):
        if unit not in alike or values[index] > values[alike[unit]]:
            alike[unit] = index
    masks = [sum(1 << model for model in models) for _, models in units]
    best = np.full((1 << num_models, num_devices + 1), -np.inf)
    best[0] = 0.0
    last = np.full(best.shape, -1, dtype=np.int32)
    sets = np.arange(1 << num_models)
    for first in range(num_models):
        before = (1 << first) - 1
        open_sets = sets[(sets & (2 * before + 1)) == before]
        open_sets = open_sets[np.isfinite(best[open_sets, num_devices])]
        for (size, models), index in alike.items():
            if min(models) != first or size > num_devices:
                continue
            extended = open_sets[(open_sets & masks[index]) == 0]
            value = best[extended, : num_devices + 1 - size] + values[index]
            target = (extended | masks[index])[:, None], np.arange(size, num_devices + 1)
            is_better = value > best[target]
            best[target] = np.where(is_better, value, best[target])
            last[target] = np.where(is_better, index, last[target])
    if not np.isfinite(best[-1, -1]):
        return None
    return _traced(units, masks, last)


def _traced(
    units: Sequence[Unit], masks: Sequence[int], last: np.ndarray[tuple[int, int], np.dtype[np.int32]]
) -> list[int]:
    """The units that lead to the set of all models."""
    chosen = []
    left, devices = last.shape[0] - 1, last.shape[1] - 1
    while left:
        index = int(last[left, devices])
        chosen.append(index)
        left ^= masks[index]
        devices -= units[index][0]
    return chosen
