"""The profile of a CPU by cores: a unit on a part of the cores computes as a smaller share of the machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from muxmesh.placement.core_profile import by_cores
from muxmesh.placement.profile import Profile
from muxmesh.types import Role
from tests.support.placement import profile


def machine_with(cores: int) -> Profile:
    measured = profile()
    machine = replace(measured.machine, device="cpu", num_devices=1, memory_bytes=12_000, cores=cores)
    return replace(measured, machine=machine)


@pytest.mark.parametrize(("cores", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_there_is_a_table_for_each_power_of_two_and_for_all_cores(cores: int, sizes: list[int]) -> None:
    divided = by_cores(machine_with(cores))
    assert all(sorted(model.tables) == sizes for model in divided.models.values())
    assert (divided.machine.num_devices, divided.machine.memory_bytes) == (cores, 12_000 // cores)


@pytest.mark.parametrize("role", Role)
def test_half_of_the_cores_at_share_100_are_the_machine_at_share_50(role: Role) -> None:
    measured = machine_with(4)
    for name, model in by_cores(measured).models.items():
        whole = measured.models[name].smoothed[1]
        assert model.tables[2].interpolated(role, 100, 4, 300) == pytest.approx(whole.interpolated(role, 50, 4, 300))
        assert model.tables[4].interpolated(role, 100, 4, 300) == pytest.approx(whole.interpolated(role, 100, 4, 300))
