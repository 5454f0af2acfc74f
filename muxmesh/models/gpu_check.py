"""Asks this machine for what units on GPUs need: software, the driver, the devices and the control program of MPS.

Whether the units fit onto the devices is decided in `device_capacity`. Initializes no device: `DeviceList` asks in a
process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import MeshConfig
from muxmesh.config.section import Location
from muxmesh.cuda.device_list import DeviceList
from muxmesh.cuda.mps import CONTROL_FOLDERS, CONTROL_PROGRAM, find_control_program
from muxmesh.errors import ConfigError, DeviceError
from muxmesh.models.device_capacity import gpu_problems, with_green_contexts
from muxmesh.models.gpu_software import GpuSoftware, software_problems
from muxmesh.models.model_spec import ModelSpec
from muxmesh.models.prepared_model import local_model_spec


def machine_gpu_problems(
    config: MeshConfig, gpus: DeviceList, base_dir: Path, cache_dir: Path
) -> Iterator[tuple[Location, str]]:
    """Yields what units on GPUs need and this machine lacks, each with the path of its field."""

    def spec_of(model: ModelConfig) -> ModelSpec | None:
        try:
            return local_model_spec(model, base_dir, cache_dir)
        except ConfigError:
            return None

    units = [(index, unit) for index, unit in enumerate(config.units) if unit.is_cuda]
    for index, unit in units:
        if unit.mps == "on" and find_control_program() is None:
            yield (
                ("units", index, "mps"),
                f"is on, but {CONTROL_PROGRAM} is neither on PATH nor in {', '.join(CONTROL_FOLDERS)}; "
                "install it, or set mps: off",
            )
    if not units:
        return
    try:
        devices = {device.index: device for device in gpus.devices}
    except DeviceError as error:
        for index, unit in units:
            yield ("units", index, "device"), f"is {unit.device}; {error}; or set device: cpu"
        return
    yield from gpu_problems(config, devices, spec_of)


def gpu_software_problems(config: MeshConfig, environ: Mapping[str, str]) -> Iterator[tuple[Location, str]]:
    """Yields what the workers of units on GPUs need installed and this Python or machine lacks."""
    units = [(index, unit) for index, unit in enumerate(config.units) if unit.is_cuda]
    if units:
        index, unit = units[0]
        for problem in software_problems(GpuSoftware.of_this_python(), environ):
            yield ("units", index, "device"), f"is {unit.device}; {problem}"


def unit_gpus(config: MeshConfig, gpus: DeviceList) -> dict[str, str]:
    """Unit name → UUID of its GPU, for units on GPUs without `machine_gpu_problems`."""
    return {unit.name: gpus.devices[unit.device_index].uuid for unit in config.units if unit.is_cuda}


def with_share_limits(config: MeshConfig, gpus: DeviceList, program: Path | None) -> MeshConfig:
    """``config`` in which it is decided what limits workers on this machine's GPUs to their shares.

    ``program``: see `mps_program`. The configuration has no `machine_gpu_problems`.
    """
    if not any(unit.is_cuda for unit in config.units):
        return config
    return with_green_contexts(config, {device.index: device for device in gpus.devices}, program is not None)


def mps_program(config: MeshConfig) -> Path | None:
    """The control program of MPS if a unit is to use it; None if none is, or this machine has none."""
    wants_mps = any(unit.is_cuda and unit.mps != "off" for unit in config.units)
    return find_control_program() if wants_mps else None


def mps_notice(config: MeshConfig, program: Path | None) -> str | None:
    """What the operator should know of units with ``mps: auto`` that get no MPS, as ``program`` is None; or None."""
    units = [unit.name for unit in config.units if unit.is_cuda and unit.mps == "auto"]
    if program is not None or not units:
        return None
    return (
        f"{CONTROL_PROGRAM} is not on this machine, so mps is off for {', '.join(units)}: "
        "one worker of a unit computes at a time, and compute_share has no effect without green_contexts"
    )


def dtype_notice(config: MeshConfig) -> str | None:
    """What the operator should know of models on GPUs whose ``dtype`` is the default, float32; or None."""
    placed = [model for unit, model in config.placements() if unit.is_cuda and "dtype" not in model.model_fields_set]
    names = list(dict.fromkeys(model.name for model in placed))
    if not names:
        return None
    return (
        f"{', '.join(names)}: computed in float32, which is exact; dtype: bfloat16 or float16 needs half the "
        "memory and is several times as fast on a GPU (dtype: float32 silences this)"
    )
