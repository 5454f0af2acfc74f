"""What it takes to get from one plan to another: which models move, and what each move costs. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from muxmesh.placement.plan import PlacedModel, PlacedUnit, Plan, place_text
from muxmesh.placement.profile import Profile

LOAD_BYTES_PER_S = 1.5 * 10**9
"""Assumed speed of loading weights, from a disk or the page cache, if a caller has not measured one."""


@dataclass(frozen=True, slots=True)
class Move:
    """One model whose place, shares or batch cap change."""

    model: str
    change: str
    """`moves` to another unit; `restarts` in its unit with other shares or another batch cap."""
    before: str
    after: str
    load_bytes: int
    """Weights that are loaded: 0 if they stay where they are."""
    load_s: float
    drained_sequences: float
    """Sequences that run now and have to end or to be computed again elsewhere."""


def moves(
    before: Plan, after: Plan, profile: Profile, running: Mapping[str, float], bytes_per_s: float = LOAD_BYTES_PER_S
) -> list[Move]:
    """The moves from ``before`` to ``after``. ``running``: model → sequences that run now.

    A unit of ``after`` continues the unit of ``before`` that has as many devices and the most bytes of weights in
    common with it. A model that is in both stays.
    """
    matched = _matched(before, after, profile)
    was = {model.load.name: (unit, model) for unit in before.units for model in unit.models}
    found = []
    for unit in after.units:
        for model in unit.models:
            name = model.load.name
            old = was.get(name)
            stays = old is not None and matched.get(id(unit)) is old[0]
            if stays and old is not None and _settings(old[1]) == _settings(model):
                continue
            weights = 0 if stays else profile.models[model.load.kind].weights_bytes
            found.append(
                Move(
                    name,
                    "restarts" if stays else "moves",
                    "nowhere" if old is None else _place(*old),
                    _place(unit, model),
                    weights,
                    weights / bytes_per_s,
                    running.get(name, 0.0),
                )
            )
    return found


def _matched(before: Plan, after: Plan, profile: Profile) -> dict[int, PlacedUnit]:
    """Unit of ``after`` by id → the unit of ``before`` that it continues, greedily by bytes in common."""
    pairs = [
        (_common_bytes(new, old, profile), new, old)
        for new in after.units
        for old in before.units
        if new.num_devices == old.num_devices
    ]
    pairs.sort(key=lambda pair: pair[0], reverse=True)
    taken: set[int] = set()
    found: dict[int, PlacedUnit] = {}
    for common, new, old in pairs:
        if common and id(new) not in found and id(old) not in taken:
            found[id(new)] = old
            taken.add(id(old))
    return found


def _common_bytes(new: PlacedUnit, old: PlacedUnit, profile: Profile) -> int:
    names = {model.load.name for model in old.models}
    return sum(profile.models[one.load.kind].weights_bytes for one in new.models if one.load.name in names)


def _settings(model: PlacedModel) -> Sequence[int]:
    return model.prefill_share, model.decode_share, model.max_num_seqs


def _place(unit: PlacedUnit, model: PlacedModel) -> str:
    place = place_text(unit.num_devices, (one.load.name for one in unit.models if one is not model))
    return f"{place}, shares {model.prefill_share}/{model.decode_share} %, {model.max_num_seqs} sequences"
