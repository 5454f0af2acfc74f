"""Whether the units on GPUs fit onto the GPUs of this machine: KV pools, weights, and what workers need besides.

Pure: devices and specs are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from pydantic import ByteSize

from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import MeshConfig, UnitConfig
from muxmesh.config.section import Location
from muxmesh.cuda.driver import DeviceInfo
from muxmesh.models.model_spec import DTYPE_BYTES, ModelSpec
from muxmesh.models.weight_image import image_bytes
from muxmesh.types import Role

WORKER_RESERVE_BYTES = 768 << 20
"""The least device memory of one worker besides pool and weights."""
_CONTEXT_BYTES = 512 << 20
"""Of it: CUDA's context and libraries, kernels, graphs, and buffers whose size does not depend on the model."""
MAX_LOGIT_ROWS = 256
"""Rows whose logits a worker has in memory at once in a step that is not of decode rows only."""
MIN_CAPABILITY = (8, 0)
"""The lowest compute capability that the kernels are compiled for."""
GREEN_CAPABILITY = (9, 0)
"""The lowest compute capability on which green contexts limit workers."""
_MIG_IN_NAME = " MIG "
"""In the driver's name of an instance, like `NVIDIA A100-SXM4-40GB MIG 1g.5gb`. Its UUID begins with `MIG-`."""

SpecOf = Callable[[ModelConfig], ModelSpec | None]
"""Returns the spec of a model; None if its files are not here yet, or have a problem that is reported elsewhere."""


def gpu_problems(
    config: MeshConfig, devices: Mapping[int, DeviceInfo], spec_of: SpecOf
) -> Iterator[tuple[Location, str]]:
    """Yields what the units on GPUs need and ``devices``, the GPUs of this machine by number, lack."""
    used_bytes: dict[int, int] = {}
    for index, unit in enumerate(config.units):
        if not unit.is_cuda:
            continue
        device = devices.get(unit.device_index)
        if device is None:
            there = ", ".join(_named(found) for found in devices.values()) or "none"
            yield (
                ("units", index, "device"),
                f"{unit.device} is not on this machine, or CUDA_VISIBLE_DEVICES hides it; visible GPUs: {there}",
            )
        elif _MIG_IN_NAME in device.name:
            yield ("units", index, "device"), f"{_named(device)} is an instance of a GPU in MIG mode; use a whole GPU"
        elif device.compute_capability < MIN_CAPABILITY:
            yield ("units", index, "device"), _too_low(device, MIN_CAPABILITY)
        elif unit.limits_by_green_contexts and device.compute_capability < GREEN_CAPABILITY:
            yield ("units", index, "green_contexts"), _too_low(device, GREEN_CAPABILITY)
        else:
            earlier_bytes = used_bytes.get(device.index, 0)
            own_bytes, parts = _needed(unit, spec_of)
            used_bytes[device.index] = earlier_bytes + own_bytes
            if used_bytes[device.index] > device.total_bytes:
                others = f", and earlier units of this GPU {_size(earlier_bytes)}" if earlier_bytes else ""
                yield (
                    ("units", index, "kv_pool"),
                    f"{parts}{others}: together {_size(used_bytes[device.index])}; {_named(device)} has "
                    f"{_size(device.total_bytes)}",
                )


def with_green_contexts(config: MeshConfig, devices: Mapping[int, DeviceInfo], has_mps: bool) -> MeshConfig:
    """``config`` in which no unit of ``devices`` has ``green_contexts: auto``. ``has_mps``: the machine has MPS.

    On compute capability 9.0 cuBLAS takes kernels with clusters of blocks. In a client of MPS that has a percentage of
    the SMs, these leave out parts of a product, without any error (docs/arbiter.md).
    """

    def decided(unit: UnitConfig) -> UnitConfig:
        device = devices.get(unit.device_index) if unit.is_cuda else None
        if unit.green_contexts != "auto" or device is None:
            return unit
        is_green = has_mps and unit.mps != "off" and device.compute_capability >= GREEN_CAPABILITY
        return unit.model_copy(update={"green_contexts": is_green})

    return config.model_copy(update={"units": tuple(map(decided, config.units))})


def _needed(unit: UnitConfig, spec_of: SpecOf) -> tuple[int, str]:
    """Device memory that a unit needs in bytes, and its parts as text."""
    specs = {model: spec_of(model) for model in unit.models}
    weight_bytes = sum(image_bytes(spec, model.dtype) for model, spec in specs.items() if spec is not None)
    num_workers = len(unit.models) * len(Role)
    reserve_bytes = len(Role) * sum(worker_bytes(model, spec) for model, spec in specs.items())
    parts = (
        f"kv_pool is {_size(unit.kv_pool)}, weights are {_size(weight_bytes)}, and {num_workers} workers need "
        f"{_size(reserve_bytes)} besides"
    )
    return unit.kv_pool + weight_bytes + reserve_bytes, parts


def _too_low(device: DeviceInfo, capability: tuple[int, int]) -> str:
    found, needed = (".".join(map(str, one)) for one in (device.compute_capability, capability))
    return f"{_named(device)} has compute capability {found}; {needed} or higher is needed"


def worker_bytes(model: ModelConfig, spec: ModelSpec | None) -> int:
    """Returns the device memory of one worker besides pool and weights, the least if the spec is not known.

    Logits are f32, beside the product in ``dtype`` that they come from. Penalties in a run of steps take four times the
    logits of a batch. An activation is one row of a step.
    """
    if spec is None:
        return WORKER_RESERVE_BYTES
    size, num_seqs = DTYPE_BYTES[model.dtype], model.max_num_seqs
    logits_bytes = spec.vocab_size * ((num_seqs + MAX_LOGIT_ROWS) * (4 + size) + num_seqs * 4 * 4)
    activation_bytes = (2 * spec.hidden_size + 3 * spec.intermediate_size) * size
    rotation_bytes = (model.max_model_len or spec.context_len) * spec.head_dim * 4
    own_bytes = logits_bytes + (model.step_token_budget + num_seqs) * activation_bytes + rotation_bytes
    return max(WORKER_RESERVE_BYTES, _CONTEXT_BYTES + own_bytes)


def _named(device: DeviceInfo) -> str:
    return f"cuda:{device.index} ({device.name})"


def _size(num_bytes: int) -> str:
    return ByteSize(num_bytes).human_readable()
