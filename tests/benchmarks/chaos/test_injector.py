"""What is made of a fault whose target does not recover, beside another fault or without one."""

import asyncio
import math
from pathlib import Path

import pytest

from benchmarks.chaos.checker import check_faults
from benchmarks.chaos.faults import Fault, Hit, NotRecovered, NotSurvived, no_error
from benchmarks.chaos.history import InjectedFault
from benchmarks.chaos.injector import Injector
from benchmarks.chaos.plan import PlannedFault
from benchmarks.chaos.processes import MeshProcesses
from muxmesh.config.runtime import MeshRuntime
from muxmesh.config.schema import MeshConfig


async def _hit(processes: MeshProcesses, target: str) -> Hit:
    return Hit(1)


async def _hit_nothing(processes: MeshProcesses, target: str) -> Hit:
    raise LookupError(target)


async def _recovered(processes: MeshProcesses, target: str, hit: Hit) -> None:
    pass


async def _not_killed(processes: MeshProcesses, target: str, hit: Hit) -> None:
    raise NotRecovered("was not killed")


async def _not_survived(processes: MeshProcesses, target: str, hit: Hit) -> None:
    raise NotSurvived("was restarted")


TABLE = (
    Fault("repaired", 1, ("a",), _hit, _recovered, allows=no_error),
    Fault("not killed", 1, ("a",), _hit, _not_killed, allows=no_error),
    Fault("not survived", 1, ("a",), _hit, _not_survived, allows=no_error),
    Fault("missed", 1, ("a",), _hit_nothing, _not_killed, allows=no_error),
)


def injected(folder: Path, *names: str) -> list[InjectedFault]:
    """What became of these faults, all injected at once."""
    config = MeshConfig.model_validate({"units": [{"models": [{"name": "m", "engine": "sim"}]}]})
    runtime = MeshRuntime(config=config, run_dir=folder, cache_dir=folder, redis_url="", prepared={})
    injector = Injector(TABLE, MeshProcesses(0, runtime), lambda: 1.0)
    asyncio.run(injector.run([PlannedFault(1.0, name, "a", 0.0) for name in names]))
    return injector.faults


@pytest.mark.parametrize("names", [("not killed",), ("not killed", "repaired"), ("not killed", "not survived")])
def test_a_process_that_is_not_killed_is_a_violation_whatever_else_happens(tmp_path: Path, names: list[str]) -> None:
    (violation,) = check_faults(injected(tmp_path, *names))
    assert violation.text == "not killed of a at 1.0 s: was not killed"


def test_a_process_that_does_not_survive_is_a_violation_unless_another_fault_happened(tmp_path: Path) -> None:
    (violation,) = check_faults(injected(tmp_path, "not survived"))
    assert violation.text.endswith("was restarted")
    assert not list(check_faults(injected(tmp_path, "not survived", "repaired")))


def test_a_fault_without_an_end_lasts_for_ever(tmp_path: Path) -> None:
    found = {fault.fault: fault.ended_at_s for fault in injected(tmp_path, *(fault.name for fault in TABLE))}
    assert found == {"repaired": 1.0, "not killed": math.inf, "not survived": 1.0, "missed": 1.0}


def test_a_fault_that_finds_no_target_has_a_note_and_no_problem(tmp_path: Path) -> None:
    (fault,) = injected(tmp_path, "missed")
    assert (fault.note, fault.problem) == ("did not run", "")
