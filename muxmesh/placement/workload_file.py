"""The workload and the cluster that `muxmesh plan` reads: models with rates, lengths and SLOs, and the devices.

Knows the files' fields and their limits. Planning is in `search`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import ByteSize, Field, ValidationError

from muxmesh.config.field_errors import field_errors
from muxmesh.config.section import MAX_BYTES, MAX_COUNT, Name, Section
from muxmesh.config.slo_config import NO_OBJECTIVE, SloConfig
from muxmesh.config.yaml_reader import read_fields, read_text
from muxmesh.errors import ConfigError
from muxmesh.placement.plan import DEFAULT_SLO_SCALE, SHAREGPT_OUTPUT_TOKENS, SHAREGPT_PROMPT_TOKENS, Cluster, ModelLoad
from muxmesh.placement.profile import Profile
from muxmesh.quoting import named, quoted

_MAX_RATE = 1e6

AnySection = TypeVar("AnySection", bound=Section)


class WorkloadModel(Section):
    """One model and its load."""

    name: Name
    """The value of GenerateRequest.model."""
    source: str | None = None
    """Its name in the profile, and its `source` in mesh.yaml. Unset: `name`."""
    rate: float | None = Field(default=None, gt=0, le=_MAX_RATE)
    """Requests per second. Required unless a load (`--load`) or a running mesh (`--live`) has it."""
    prompt_tokens: float = Field(default=SHAREGPT_PROMPT_TOKENS, ge=1, le=MAX_COUNT)
    """Mean prompt length. The default is that of ShareGPT, as of MuxServe's estimator."""
    output_tokens: float = Field(default=SHAREGPT_OUTPUT_TOKENS, ge=1, le=MAX_COUNT)
    """Mean output length."""
    slo: SloConfig | None = None
    """Its objective, copied into mesh.yaml. Unset: estimates use a scale of 8."""

    @property
    def kind(self) -> str:
        return self.source or self.name


class ClusterSection(Section):
    """Nodes with equal devices."""

    nodes: int = Field(default=1, ge=1, le=100_000)
    """Machines."""
    devices_per_node: int = Field(ge=1, le=1024)
    """Devices of each; a unit lies on one machine."""
    memory: ByteSize = Field(ge=1, le=MAX_BYTES)
    """Memory of one device for weights, KV and workers, like `80GiB`."""
    worker_memory: ByteSize | None = Field(default=None, ge=0, le=MAX_BYTES)
    """What each worker needs beside weights and KV. Unset: 0.75 GiB on a GPU, nothing on a CPU."""
    over_subscription: int | None = Field(default=None, ge=0, le=100)
    """Percent by which the decode shares of a unit may exceed 100. Unset: 20 on a GPU, 0 on a CPU."""


class WorkloadSection(Section):
    """The root of a workload file."""

    models: tuple[WorkloadModel, ...] = Field(min_length=1)
    """All models that are to be placed."""
    cluster: ClusterSection | None = None
    """Unset: `--cluster`, else the machine of the profile."""


def read_workload(path: Path) -> WorkloadSection:
    """Reads a workload. Raises ConfigError with one line for each problem."""
    workload = _read(path, WorkloadSection)
    names = [model.name for model in workload.models]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{path}: models: {named(name)}: is the name of two models; each needs its own")
    for model in workload.models:
        if model.slo is not None and model.slo.is_empty:
            raise ConfigError(f"{path}: models: {named(model.name)}: slo: {NO_OBJECTIVE}")
    return workload


def read_cluster(text: str) -> ClusterSection:
    """Reads ``NODESxDEVICESxMEMORY``, like `4x8x80GiB`, or a file with these fields. Raises ConfigError."""
    short = re.fullmatch(r"(\d{1,6})x(\d{1,4})x(\S+)", text)
    if short is None:
        return _read(Path(text), ClusterSection)
    nodes, devices, memory = short.groups()
    try:
        return ClusterSection.model_validate({"nodes": int(nodes), "devices_per_node": int(devices), "memory": memory})
    except ValidationError as error:
        raise ConfigError(_described(error, ClusterSection, f"--cluster {text}", {})) from error


def model_loads(workload: WorkloadSection, profile: Profile, origin: str) -> list[ModelLoad]:
    """The models for estimates.

    Raises ConfigError, which names the model, for one without a rate, that was not profiled, or longer than profiled.
    """
    loads = []
    for model in workload.models:
        if model.rate is None:
            raise ConfigError(
                f"{origin}: models: {named(model.name)}: rate: is required, in requests per second; or give --load"
            )
        if model.kind not in profile.models:
            raise ConfigError(
                f"{origin}: models: {named(model.name)}: {quoted(model.kind)} is not in the profile, which has: "
                f"{', '.join(map(named, profile.models))}; `muxmesh profile {named(model.kind)}` adds it"
            )
        settings = profile.models[model.kind].settings
        if settings is not None and model.prompt_tokens + model.output_tokens > settings.max_model_len:
            raise ConfigError(
                f"{origin}: models: {named(model.name)}: prompt_tokens and output_tokens are "
                f"{model.prompt_tokens + model.output_tokens:.0f} together; {quoted(model.kind)} was profiled with at "
                f"most {settings.max_model_len} (max_model_len)"
            )
        loads.append(_load(model, model.rate))
    return loads


def _load(model: WorkloadModel, rate: float) -> ModelLoad:
    slo = model.slo or SloConfig()
    return ModelLoad(
        model.name,
        model.kind,
        rate,
        model.prompt_tokens,
        model.output_tokens,
        slo.scale or DEFAULT_SLO_SCALE,
        slo.ttft_s,
        slo.tpot_s,
    )


def cluster_of(section: ClusterSection, is_cpu: bool, worker_bytes: int) -> Cluster:
    """``section`` with the defaults of the kind of device. ``worker_bytes``: of a GPU's worker."""
    over = section.over_subscription
    needs = section.worker_memory
    return Cluster(
        section.nodes,
        section.devices_per_node,
        section.memory,
        (0 if is_cpu else worker_bytes) if needs is None else needs,
        (0 if is_cpu else 20) if over is None else over,
    )


def _read(path: Path, section: type[AnySection]) -> AnySection:
    fields = read_fields(read_text(path), str(path))
    if fields.problems:
        raise ConfigError("\n".join(_line(path, one, problem, fields.lines) for one, problem in fields.problems))
    if not isinstance(fields.data, dict):
        raise ConfigError(f"{path}:1: must be a mapping with fields like {', '.join(section.model_fields)}")
    try:
        return section.model_validate(fields.data)
    except ValidationError as error:
        raise ConfigError(_described(error, section, str(path), fields.lines)) from error


def _described(
    error: ValidationError, section: type[Section], origin: str, lines: Mapping[tuple[str | int, ...], int]
) -> str:
    found = [(location, problem) for location, problem in field_errors(error, section) if problem is not None]
    return "\n".join(_line(origin, location, problem, lines) for location, problem in found)


def _line(
    origin: Path | str, location: tuple[str | int, ...], problem: str, lines: Mapping[tuple[str | int, ...], int]
) -> str:
    parts = [location[:end] for end in range(len(location), 0, -1)]
    line = next((f":{lines[one]}" for one in parts if one in lines), "")
    return f"{origin}{line}: {'.'.join(map(str, location))}: {problem}"
