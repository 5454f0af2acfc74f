"""What `muxmesh plan` plans with: profile, workload, cluster, plans to compare with, from our files or MuxServe's.

Reads files; searches and prints nothing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from loadtest.spec import parse_spec
from loadtest.workload import sketch
from muxmesh.config.load import load_mesh_config
from muxmesh.config.schema import MeshConfig
from muxmesh.errors import ConfigError
from muxmesh.models.device_capacity import WORKER_RESERVE_BYTES
from muxmesh.placement.core_profile import by_cores
from muxmesh.placement.measured_cells import MeasuredSettings
from muxmesh.placement.mesh_writer import MeshTarget
from muxmesh.placement.muxserve_files import PlacementInput, read_muxserve_profile, read_placement_input
from muxmesh.placement.plan import (
    SHAREGPT_OUTPUT_TOKENS,
    SHAREGPT_PROMPT_TOKENS,
    Cluster,
    ModelLoad,
    PlacedModel,
    PlacedUnit,
    Plan,
)
from muxmesh.placement.profile import Profile
from muxmesh.placement.profile_file import read_profile
from muxmesh.placement.workload_file import (
    ClusterSection,
    WorkloadModel,
    WorkloadSection,
    cluster_of,
    model_loads,
    read_cluster,
    read_workload,
)
from muxmesh.quoting import named

LEAST_RATE = 0.001
"""Requests per second of a model that had none while a mesh was watched: it has to be placed too."""


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """All that a search needs, and what a mesh.yaml needs beside it."""

    profile: Profile
    loads: Sequence[ModelLoad]
    cluster: Cluster
    target: MeshTarget
    published: Plan | None = None
    """Of MuxServe's input, if it has one."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What a running mesh counted of one model."""

    finished: int
    running: int
    waiting: int
    prompt_tokens: int
    output_tokens: int


class ObservedLoad(NamedTuple):
    """The load of one model by `--load` or `--live`: requests per second, and mean lengths in tokens."""

    rate: float
    prompt_tokens: float
    output_tokens: float


def plan_inputs(arguments: argparse.Namespace, live: Mapping[str, ObservedLoad] | None) -> PlanInputs:
    """Reads all files. ``live``: the load of each model of a running mesh.

    Raises ConfigError, which names the file or option, what is wrong and what would be right.
    """
    profile = any_profile(arguments.profile)
    if arguments.contention is not None:
        profile = replace(profile, contention=arguments.contention)
    if arguments.muxserve is not None:
        return _of_muxserve(read_placement_input(arguments.muxserve), profile, arguments)
    workload = _workload(arguments, live)
    is_cpu = profile.machine.device == "cpu"
    if is_cpu:
        profile = by_cores(profile)
    loads = model_loads(workload, profile, str(arguments.workload or arguments.compare))
    profile = _limited(profile, arguments.max_tensor_parallel, is_cpu)
    cluster = cluster_of(_cluster_section(arguments, workload, profile), is_cpu, WORKER_RESERVE_BYTES)
    if is_cpu and cluster.num_devices > profile.machine.num_devices:
        raise ConfigError(
            f"cluster: has {cluster.num_devices} cores, the profiled machine {profile.machine.num_devices}; "
            "plan for the machine that was profiled, or profile that one"
        )
    target = MeshTarget(
        cluster,
        is_cpu,
        {model.name: model.kind for model in workload.models},
        {model.name: model.slo for model in workload.models if model.slo is not None},
        _settings(profile, loads),
    )
    return PlanInputs(profile, loads, cluster, target)


def any_profile(path: Path) -> Profile:
    """A profile of ours, or MuxServe's if the file's name ends in `.json` or `.json.gz`."""
    return read_muxserve_profile(path) if _is_json(path) else read_profile(path)


def _is_json(path: Path) -> bool:
    """Whether a file is one of MuxServe's, by its name; ours are YAML."""
    return path.name.endswith((".json", ".json.gz"))


def _workload(arguments: argparse.Namespace, live: Mapping[str, ObservedLoad] | None) -> WorkloadSection:
    if live is not None and arguments.workload is None:
        config = mesh_config(arguments.compare)
        models = tuple(
            WorkloadModel(name=name, source=model.source, slo=model.slo) for name, model in config.models().items()
        )
        workload = WorkloadSection(models=models)
    elif arguments.workload is None:
        raise ConfigError("--workload: is required: a file with the models, their rates and lengths")
    else:
        workload = read_workload(arguments.workload)
    observed = live if live is not None else _of_load(arguments.load) if arguments.load else None
    origin = "--load" if live is None else "--live"
    return workload if observed is None else _with_observed(workload, observed, origin)


def _of_load(text: str) -> dict[str, ObservedLoad]:
    """The load of each model among the requests of a load, as in `muxmesh loadtest`."""
    requests = sketch(parse_spec(text))
    span_s = max((one.at_s for one in requests), default=0.0) or 1.0
    by_model: dict[str, list[tuple[int, int]]] = {}
    for one in requests:
        lengths = one.body.prompt_tokens, min(one.body.num_output or one.max_new_tokens, one.max_new_tokens)
        by_model.setdefault(one.model or "", []).append(lengths)
    return {
        name: ObservedLoad(
            len(found) / span_s, _mean([prompt for prompt, _ in found]), _mean([output for _, output in found])
        )
        for name, found in by_model.items()
    }


def _mean(values: Sequence[int]) -> float:
    return max(1.0, sum(values) / len(values))


def _with_observed(workload: WorkloadSection, observed: Mapping[str, ObservedLoad], origin: str) -> WorkloadSection:
    """Rates and lengths as observed. A load of one model without a name is that of the only model."""
    if set(observed) == {""} and len(workload.models) == 1:
        observed = {workload.models[0].name: observed[""]}
    unknown = set(observed) - {model.name for model in workload.models}
    if unknown:
        names = ", ".join(sorted(map(named, unknown))) or "(no name)"
        raise ConfigError(
            f"{origin}: has requests for {names}, which the workload does not list; add them to its models"
        )
    models = []
    for model in workload.models:
        load = observed.get(model.name, ObservedLoad(LEAST_RATE, model.prompt_tokens, model.output_tokens))
        models.append(model.model_copy(update=load._asdict() | {"rate": max(load.rate, LEAST_RATE)}))
    return workload.model_copy(update={"models": tuple(models)})


def live_loads(before: Mapping[str, Counts], after: Mapping[str, Counts], seconds: float) -> dict[str, ObservedLoad]:
    """The load of each model between two readings of a mesh's counters.

    Arrivals are the requests that ended, and those that run or wait now less those that did before. Lengths are those
    of all requests so far where fewer than ten ended in between.
    """
    loads = {}
    for name, late in after.items():
        early = before.get(name, Counts(0, 0, 0, 0, 0))
        ended = late.finished - early.finished
        arrived = ended + late.running + late.waiting - early.running - early.waiting
        base = early if ended >= 10 else Counts(0, 0, 0, 0, 0)
        num = max(1, late.finished - base.finished)
        prompt = (late.prompt_tokens - base.prompt_tokens) / num if late.finished else SHAREGPT_PROMPT_TOKENS
        output = (late.output_tokens - base.output_tokens) / num if late.finished else SHAREGPT_OUTPUT_TOKENS
        loads[name] = ObservedLoad(max(arrived / seconds, LEAST_RATE), max(1.0, prompt), max(1.0, output))
    return loads


def _cluster_section(arguments: argparse.Namespace, workload: WorkloadSection, profile: Profile) -> ClusterSection:
    if arguments.cluster is not None:
        return read_cluster(arguments.cluster)
    if workload.cluster is not None:
        return workload.cluster
    machine = profile.machine
    return ClusterSection.model_validate(
        {"nodes": 1, "devices_per_node": machine.num_devices, "memory": machine.memory_bytes}
    )


def _limited(profile: Profile, largest: int | None, is_cpu: bool) -> Profile:
    """Without the tables of more devices than ``largest``."""
    if largest is None or is_cpu:
        return profile
    models = {
        name: replace(model, tables={size: table for size, table in model.tables.items() if size <= largest})
        for name, model in profile.models.items()
    }
    return replace(profile, models=models)


def _settings(profile: Profile, loads: Sequence[ModelLoad]) -> dict[str, MeasuredSettings]:
    """Model → the settings that its times hold for, of those that were measured by `muxmesh profile`."""
    found = {load.name: profile.models[load.kind].settings for load in loads}
    return {name: settings for name, settings in found.items() if settings is not None}


def _of_muxserve(given: PlacementInput, profile: Profile, arguments: argparse.Namespace) -> PlanInputs:
    loads = [
        ModelLoad(one.name, one.kind, one.rate, given.mean_prompt_tokens, given.mean_output_tokens)
        for one in given.models
    ]
    missing = {load.kind for load in loads} - set(profile.models)
    if missing:
        raise ConfigError(f"{arguments.profile}: has no times of {', '.join(sorted(missing))}, which the input names")
    profile = _limited(profile, arguments.max_tensor_parallel, is_cpu=False)
    cluster = Cluster(given.num_nodes, given.devices_per_node, profile.machine.memory_bytes)
    target = MeshTarget(cluster, False, {load.name: load.kind for load in loads}, {})
    return PlanInputs(profile, loads, cluster, target, published_plan(given, loads))


def published_plan(given: PlacementInput, loads: Sequence[ModelLoad]) -> Plan | None:
    """The plan that MuxServe's authors published for ``given``. None if the file has none."""
    by_name = {load.name: load for load in loads}
    units = tuple(
        PlacedUnit(
            unit.num_devices,
            tuple(
                PlacedModel(by_name[one.name], one.prefill_share, one.decode_share, one.max_num_seqs)
                for one in unit.models
            ),
        )
        for unit in given.published_units
    )
    return Plan(units) if units else None


def mesh_config(path: Path) -> MeshConfig:
    """An existing mesh.yaml. Raises ConfigError if it is invalid."""
    return load_mesh_config(path, variables=os.environ).config


def compared_plan(path: Path, inputs: PlanInputs) -> Plan:
    """The plan of an existing mesh.yaml, or the published one of a MuxServe input, for the models of ``inputs``.

    Raises ConfigError for models that the workload does not have, and for those that the plan does not serve.
    """
    by_name = {load.name: load for load in inputs.loads}
    if _is_json(path):
        plan = published_plan(read_placement_input(path), inputs.loads)
        if plan is None:
            raise ConfigError(f"{path}: has no published_units to compare with")
        return plan
    config = mesh_config(path)
    strange = [name for name in config.models() if name not in by_name]
    missing = [name for name in by_name if name not in config.models()]
    for names, problem in ((strange, "is not in the workload"), (missing, "is in the workload, but has no unit")):
        if names:
            raise ConfigError(
                f"{path}: models: {', '.join(map(named, names))}: {problem}; compare plans of one workload"
            )
    units = []
    for unit in config.units:
        size = unit.tensor_parallel
        if inputs.target.is_cpu:
            size = len(unit.cores) if unit.cores else inputs.cluster.num_devices
        placed = tuple(
            PlacedModel(by_name[one.name], one.compute_share.prefill, one.compute_share.decode, one.max_num_seqs)
            for one in unit.models
        )
        _refuse_unprofiled(path, unit.name, size, placed, inputs)
        units.append(PlacedUnit(size, placed))
    return Plan(tuple(units))


def _refuse_unprofiled(path: Path, unit: str, size: int, models: Sequence[PlacedModel], inputs: PlanInputs) -> None:
    """Raises ConfigError for a model of a unit whose times on ``size`` devices are not known."""
    what = "cores" if inputs.target.is_cpu else "devices (tensor_parallel)"
    for one in models:
        sizes = sorted(inputs.profile.models[one.load.kind].tables)
        if size not in sizes:
            raise ConfigError(
                f"{path}: units: {named(unit)}: has {size} {what}; {named(one.load.name)} can be estimated on "
                f"{', '.join(map(str, sizes))}"
            )
