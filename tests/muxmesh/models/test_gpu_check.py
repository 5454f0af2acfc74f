"""What units on GPUs need of the machine: a table of machines and settings."""

from pathlib import Path
from typing import Any

import pytest

from muxmesh.config.load import parse_mesh_config
from muxmesh.config.schema import MeshConfig
from muxmesh.cuda.device_list import DeviceList
from muxmesh.cuda.driver import DeviceInfo
from muxmesh.errors import DeviceError
from muxmesh.models.gpu_check import (
    dtype_notice,
    gpu_software_problems,
    machine_gpu_problems,
    mps_notice,
    mps_program,
    unit_gpus,
)
from tests.support.mps import FAKE_FOLDER, FAKE_PROGRAM

GIB = 1024**3


class Gpus(DeviceList):
    """A machine with GPUs of 80 GiB."""

    def __init__(self, num_gpus: int) -> None:
        self.devices = tuple(
            DeviceInfo(index, f"GPU-{index}", "NVIDIA H100", 132, (9, 0), 80 * GIB, True, True, False)
            for index in range(num_gpus)
        )


class NoDriver(DeviceList):
    @property
    def devices(self) -> tuple[DeviceInfo, ...]:
        raise DeviceError("cannot load libcuda.so.1")


def mesh(*units: dict[str, Any]) -> MeshConfig:
    return MeshConfig.model_validate(
        {"units": [{"name": f"u{index}", "models": [{"name": "m"}], **unit} for index, unit in enumerate(units)]}
    )


@pytest.fixture(params=[True, False])
def has_mps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr("muxmesh.cuda.mps.CONTROL_FOLDERS", (str(FAKE_FOLDER),) if request.param else ())
    monkeypatch.setenv("PATH", "/nonexistent")
    assert isinstance(request.param, bool)
    return request.param


def problems(config: MeshConfig, gpus: DeviceList) -> list[tuple[str | int, str]]:
    """Field and problem of each."""
    found = machine_gpu_problems(config, gpus, Path("/nonexistent"), Path("/nonexistent"))
    return [(location[-1], problem) for location, problem in found]


@pytest.mark.parametrize(
    ("gpus", "device", "problem"),
    [
        (Gpus(2), "cuda:1", None),
        (NoDriver(), "cpu", None),
        (Gpus(0), "cuda:0", "cuda:0 is not on this machine, or CUDA_VISIBLE_DEVICES hides it; visible GPUs: none"),
        (
            Gpus(2),
            "cuda:2",
            "cuda:2 is not on this machine, or CUDA_VISIBLE_DEVICES hides it; visible GPUs: cuda:0 (NVIDIA H100), "
            "cuda:1 (NVIDIA H100)",
        ),
        (NoDriver(), "cuda:0", "is cuda:0; cannot load libcuda.so.1; or set device: cpu"),
    ],
)
def test_a_missing_device_is_named_with_what_the_machine_has(
    gpus: DeviceList, device: str, problem: str | None
) -> None:
    assert problems(mesh({"device": device}), gpus) == ([("device", problem)] if problem else [])


def test_what_workers_on_a_gpu_need_installed_is_asked_once_and_not_for_a_cpu() -> None:
    no_compiler = {"PATH": "/nonexistent"}
    assert list(gpu_software_problems(mesh({}), no_compiler)) == []
    found = list(gpu_software_problems(mesh({}, {"device": "cuda:0"}, {"device": "cuda:1"}), no_compiler))
    problem = "is cuda:0; Triton needs a C compiler, and neither gcc nor clang is on PATH; install gcc, or set CC"
    assert (("units", 1, "device"), problem) in found
    assert all(location == ("units", 1, "device") for location, _ in found)


def test_a_unit_has_to_fit_onto_its_device() -> None:
    ((field, problem),) = problems(mesh({"device": "cuda:0", "kv_pool": "81GiB"}), Gpus(1))
    assert field == "kv_pool"
    assert problem.endswith("cuda:0 (NVIDIA H100) has 80.0GiB")


def test_a_unit_that_must_use_mps_needs_the_control_program(has_mps: bool) -> None:
    found = problems(mesh({"device": "cuda:0", "mps": "on"}), Gpus(1))
    if has_mps:
        assert found == []
    else:
        ((field, problem),) = found
        assert field == "mps"
        assert problem.startswith("is on, but nvidia-cuda-mps-control is neither on PATH nor in ")


@pytest.mark.parametrize("mps", ["auto", "on"])
def test_mps_is_used_where_the_control_program_is(has_mps: bool, mps: str) -> None:
    assert mps_program(mesh({"device": "cuda:0", "mps": mps})) == (FAKE_PROGRAM if has_mps else None)


@pytest.mark.parametrize("unit", [{"device": "cpu"}, {"device": "cuda:0", "mps": "off"}])
def test_mps_is_not_used_by_a_mesh_that_does_not_want_it(has_mps: bool, unit: dict[str, Any]) -> None:
    assert mps_program(mesh(unit)) is None
    assert mps_notice(mesh(unit), None) is None


def test_the_operator_is_told_that_mps_is_off_because_the_program_is_missing() -> None:
    config = mesh({"device": "cuda:0"}, {"device": "cuda:1", "mps": "off"})
    notice = mps_notice(config, None)
    assert notice is not None
    assert notice.startswith("nvidia-cuda-mps-control is not on this machine, so mps is off for u0: one worker")
    assert mps_notice(config, Path("program")) is None


def test_each_unit_on_a_gpu_gets_its_uuid() -> None:
    config = mesh({"device": "cuda:1"}, {"device": "cpu"}, {"device": "cuda:0"})
    assert unit_gpus(config, Gpus(2)) == {"u0": "GPU-1", "u2": "GPU-0"}


def test_a_model_on_a_gpu_without_a_dtype_is_noted() -> None:
    text = "units: [{device: 'cuda:0', models: [{name: a}, {name: b, dtype: float32}]}, {name: c, models: [{name: a}]}]"
    notice = dtype_notice(parse_mesh_config(text, "mesh.yaml").config)
    assert notice is not None and notice.startswith("a: computed in float32, which is exact; dtype: bfloat16")
    assert dtype_notice(parse_mesh_config("units: [{models: [{name: a}]}]", "mesh.yaml").config) is None
