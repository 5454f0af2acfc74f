"""Cases from the files of measured runs: what MuxServe's authors served, on which devices, and how. Pure.

What the files do not say is derived, each rule in the same way for every file:

- Synthetic workloads: the k-th model has the rate ``max_rate * k ** -alpha``, where the highest rate is 40 x scale. The
  numbers of requests are in the file, arrivals are Poisson.
- ChatLMSYS: rates are in the file of the plan; all requests arrive within ``requests / rate`` seconds. Mean lengths
  follow from tokens, decode steps and decode batches.
- Shares of muxserve: the file's, else prefill 80 (7B), 90 (13B), 100 (larger), decode 30, the smallest share of the
  profile, which meets all rates but the highest by Alg. 2.
- spatial: the file's number of devices, else the fewest that hold the model, and then twice as many for the model with
  the most parameters x rate on a device, until the cluster is used.
- temporal: the units of muxserve. The whole device computes one step at a time: prefills first, in strict order of
  arrival, then decodes by the oldest request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.muxserve.cases import ModelCase, UnitCase
from benchmarks.muxserve.constants import Constants
from muxmesh.errors import ConfigError
from muxmesh.placement.muxserve_files import LLAMA_SIZES, MeasuredModel, MeasuredRun, PlacementInput

HIGHEST_RATE = 40.0
"""Requests per second of the first model at scale 1."""
DECODE_SHARE = 30
SPATIAL_SHARES = (100, 90)
FEWEST_DEVICES = {"llama-7b": 1, "llama-13b": 1, "llama-30b": 2, "llama-65b": 4}
SLO_DEVICES = {"llama-7b": 1, "llama-13b": 1, "llama-30b": 4, "llama-65b": 8}
"""Devices of the unloaded latency to which SLO scales refer: those of `spatial` in the synthetic runs."""
MAX_NUM_SEQS = 1024
MAX_DEGREE = 8
OVER_SUBSCRIPTION = 20


@dataclass(frozen=True, slots=True)
class MeasuredCase:
    """One system under one workload: its units, and what was measured of each model by name."""

    name: str
    system: str
    units: tuple[UnitCase, ...]
    measured: dict[str, MeasuredModel]


def measured_case(run: MeasuredRun, name: str, placement: PlacementInput | None, constants: Constants) -> MeasuredCase:
    """The units of a measured run. Raises ConfigError if rates or units are neither in the run nor in ``placement``."""
    models = {one.name: _model_case(run, rank, one, placement, constants) for rank, one in enumerate(_ranked(run), 1)}
    units = [
        _unit(run.system, f"unit{index}", num_devices, [models[one] for one in names])
        for index, (num_devices, names) in enumerate(_placed(run, placement))
    ]
    return MeasuredCase(f"{name} {run.system}", run.system, tuple(units), {one.name: one for one in run.models})


def _ranked(run: MeasuredRun) -> list[MeasuredModel]:
    """By number, which for the synthetic workloads is the rank of the rate."""
    return sorted(run.models, key=lambda one: int("".join(filter(str.isdigit, one.name)) or 0))


def _model_case(
    run: MeasuredRun, rank: int, model: MeasuredModel, placement: PlacementInput | None, constants: Constants
) -> ModelCase:
    if model.num_requests is None:
        raise ConfigError(f"{model.name}: the file does not say how many requests it got")
    if run.alpha is not None and run.scale is not None:
        rate = HIGHEST_RATE * run.scale * rank**-run.alpha
        prompt, output, duration_s = constants.mean_prompt_tokens, constants.mean_output_tokens, None
    else:
        rate = _rate(model, placement)
        prompt, output = mean_lengths(model)
        duration_s = model.num_requests / rate
    prefill_share, decode_share = _shares(run.system, model)
    return ModelCase(
        name=model.name,
        kind=model.kind,
        rate=rate,
        num_requests=model.num_requests,
        prefill_share=prefill_share,
        decode_share=decode_share,
        max_num_seqs=MAX_NUM_SEQS if run.system == "muxserve" else constants.baseline_max_num_seqs,
        mean_prompt=prompt,
        mean_output=output,
        output_spread="exponential",
        longest_output=max(constants.longest_output_tokens, 1.5 * output),
        duration_s=duration_s,
        slo_degree=SLO_DEVICES[model.kind],
    )


def _shares(system: str, model: MeasuredModel) -> tuple[int, int]:
    if system == "temporal":
        return 100, 100
    if model.prefill_share is not None and model.decode_share is not None:
        return model.prefill_share, model.decode_share
    return SPATIAL_SHARES if system == "spatial" else (LLAMA_SIZES[model.kind].prototype.prefill_share, DECODE_SHARE)


def _rate(model: MeasuredModel, placement: PlacementInput | None) -> float:
    rates = {one.name: one.rate for one in placement.models} if placement else {}
    if model.name not in rates:
        raise ConfigError(f"{model.name}: its rate is not known; give the file of the plan with --plan")
    return rates[model.name]


def mean_lengths(model: MeasuredModel) -> tuple[float, float]:
    """Mean tokens of a prompt and of an output. The first output token is computed by the prefill step."""
    assert model.num_requests and model.tokens_per_s and model.num_decode_steps and model.mean_decode_batch
    output = 1 + model.mean_decode_batch * model.num_decode_steps / model.num_requests
    return max(2.0, model.tokens_per_s / model.throughput - output), output


def _placed(run: MeasuredRun, placement: PlacementInput | None) -> list[tuple[int, list[str]]]:
    """(devices, names of models) of each unit."""
    if run.system == "spatial":
        if all(one.device for one in run.models):
            return [(int(one.device or 0), [one.name]) for one in _ranked(run)]
        return [(num_devices, [name]) for name, num_devices in spatial_devices(_needed(placement)).items()]
    if all(one.device for one in run.models):
        devices = dict.fromkeys(str(one.device) for one in _ranked(run))
        return [(_mesh_size(device), [one.name for one in _ranked(run) if one.device == device]) for device in devices]
    return [(unit.num_devices, [one.name for one in unit.models]) for unit in _needed(placement).published_units]


def spatial_devices(placement: PlacementInput) -> dict[str, int]:
    """Devices of each model if every model has its own. Raises ConfigError if the cluster is too small."""
    total = placement.num_nodes * placement.devices_per_node
    devices = {one.name: FEWEST_DEVICES[one.kind] for one in placement.models}
    if sum(devices.values()) > total:
        raise ConfigError(f"spatial needs {sum(devices.values())} devices; the cluster has {total}")
    loads = {one.name: one.rate * LLAMA_SIZES[one.kind].num_parameters for one in placement.models}
    while True:
        fitting = [
            one for one, num in devices.items() if sum(devices.values()) + num <= total and 2 * num <= MAX_DEGREE
        ]
        if not fitting:
            return devices
        devices[max(fitting, key=lambda one: loads[one] / devices[one])] *= 2


def _needed(placement: PlacementInput | None) -> PlacementInput:
    if placement is None or not placement.published_units:
        raise ConfigError("the file does not say which models share a unit; give the file of the plan with --plan")
    return placement


def _mesh_size(device: str) -> int:
    """N of `meshNidxM`."""
    size = device.removeprefix("mesh").partition("idx")[0]
    if not size.isdigit():
        raise ConfigError(f"dev: is {device!r}; a unit like mesh8idx0 is needed")
    return int(size)


def _unit(system: str, name: str, num_devices: int, models: Sequence[ModelCase]) -> UnitCase:
    is_temporal = system == "temporal"
    return UnitCase(
        name=name,
        num_devices=num_devices,
        models=tuple(models),
        mode="temporal" if is_temporal else "adbs",
        over_subscription=0 if is_temporal else OVER_SUBSCRIPTION,
        strict_order=is_temporal,
    )
