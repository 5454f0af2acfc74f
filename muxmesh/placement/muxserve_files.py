"""Reads the files that the authors of MuxServe published: profile, placement inputs and plans, measured runs.

JSON, gzip or not. Knows their fields, and the sizes of the LLaMA models, which the files do not have. Times are in
milliseconds in the files and in seconds here.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muxmesh.errors import ConfigError
from muxmesh.placement.plan import SHAREGPT_OUTPUT_TOKENS, SHAREGPT_PROMPT_TOKENS
from muxmesh.placement.profile import MachineFacts, ModelProfile, Profile, PrototypeConstants
from muxmesh.placement.step_table import NO_VALUE, StepTable, table_from_cells
from muxmesh.quoting import named, quoted

MAX_FILE_BYTES = 64 * 1024 * 1024
A100_80GB = MachineFacts("cuda", "NVIDIA A100-SXM4-80GB", 8, 80 * 2**30)
"""The machine of the published profile."""


@dataclass(frozen=True, slots=True)
class LlamaSize:
    """Sizes of a LLaMA model in float16, without grouped-query attention."""

    num_parameters: int
    num_layers: int
    num_heads: int
    prototype: PrototypeConstants
    head_dim: int = 128

    @property
    def weights_bytes(self) -> int:
        return 2 * self.num_parameters

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * 2 * self.num_layers * self.num_heads * self.head_dim


LLAMA_SIZES: Mapping[str, LlamaSize] = {
    "llama-7b": LlamaSize(6_738_415_616, 32, 32, PrototypeConstants(14.0, 0.0001, 80)),
    "llama-13b": LlamaSize(13_015_864_320, 40, 40, PrototypeConstants(26.0, 0.00008, 90)),
    "llama-30b": LlamaSize(32_528_943_616, 60, 52, PrototypeConstants(60.0, 0.00007, 100)),
    "llama-65b": LlamaSize(65_285_660_672, 80, 64, PrototypeConstants(130.0, 0.00007, 100)),
}


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model of a workload: its name, its kind in the profile, and its requests per second."""

    name: str
    kind: str
    rate: float


@dataclass(frozen=True, slots=True)
class PublishedPlacement:
    """A model in a published plan. Shares are in percent."""

    name: str
    kind: str
    tensor_parallel: int
    prefill_share: int
    decode_share: int
    max_num_seqs: int


@dataclass(frozen=True, slots=True)
class PublishedUnit:
    """A unit of a published plan."""

    num_devices: int
    models: tuple[PublishedPlacement, ...]


@dataclass(frozen=True, slots=True)
class PlacementInput:
    """A cluster, models with rates, and the plan that MuxServe's authors published for them, if the file has one."""

    what: str
    num_nodes: int
    devices_per_node: int
    models: tuple[NamedModel, ...]
    mean_prompt_tokens: int
    """Of MuxServe's estimator."""
    mean_output_tokens: int
    published_units: tuple[PublishedUnit, ...] = ()
    published_score: float | None = None
    """Of the published plan on MuxServe's own estimator."""


@dataclass(frozen=True, slots=True)
class MeasuredModel:
    """What MuxServe's authors measured of one model in one run. None: the file does not say."""

    name: str
    kind: str
    throughput: float
    """Completed requests per second."""
    mean_ttft_s: float
    rate_floor: int | None = None
    """Requests per second, rounded down, at least 1."""
    device: str | None = None
    """Its unit; of `spatial` the number of devices."""
    mean_latency_s: float | None = None
    mean_tpot_s: float | None = None
    num_requests: int | None = None
    tokens_per_s: float | None = None
    """Prompt and output tokens."""
    prefill_share: int | None = None
    decode_share: int | None = None
    percentiles_s: Mapping[str, float] | None = None
    """Like `p99[TTFT]`."""
    within_slo: Mapping[float, int] | None = None
    """Scale of the SLO → number of requests within it."""
    num_decode_steps: int | None = None
    mean_decode_batch: float | None = None
    num_prefill_steps: int | None = None
    mean_prefill_batch: float | None = None


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """One system under one workload. ``alpha`` and ``scale`` (of rates) are those of the synthetic workloads."""

    system: str
    """`muxserve`, `spatial` or `temporal`."""
    models: tuple[MeasuredModel, ...]
    alpha: float | None = None
    scale: float | None = None


def read_muxserve_profile(path: Path) -> Profile:
    """Reads the published profile: kind → tensor-parallel degree → share → batch → length → milliseconds.

    Raises ConfigError, which names the file and the entry.
    """
    content = _read(path)
    models = {}
    for kind, degrees in _mapping(content, path, "the file", "kinds of models").items():
        size = _size(kind, path)
        tables = {
            _number(degree, path, f"{kind}: tensor-parallel degree"): _table(shares, path, f"{kind}: {degree}")
            for degree, shares in _mapping(degrees, path, kind, "tensor-parallel degrees").items()
        }
        models[kind] = ModelProfile(kind, size.weights_bytes, size.kv_bytes_per_token, tables, prototype=size.prototype)
    return Profile(A100_80GB, models)


def _table(shares: Any, path: Path, where: str) -> StepTable:
    """A table from share → batch → length → {prefill, decoding}; the entries of a file are in no order."""
    by_share = {
        _number(share, path, f"{where}: share"): {
            _number(batch, path, f"{where}: batch"): {
                _number(length, path, f"{where}: length"): _mapping(cell, path, where, "prefill and decoding")
                for length, cell in _mapping(lengths, path, where, "lengths").items()
            }
            for batch, lengths in _mapping(batches, path, where, "batches").items()
        }
        for share, batches in _mapping(shares, path, where, "shares").items()
    }
    batch_axis = sorted({batch for batches in by_share.values() for batch in batches})
    length_axis = sorted({one for batches in by_share.values() for lengths in batches.values() for one in lengths})

    def cells(role: str) -> list[list[list[float]]]:
        return [
            [
                [_seconds(by_share[share].get(batch, {}).get(length, {}), role, path, where) for length in length_axis]
                for batch in batch_axis
            ]
            for share in sorted(by_share)
        ]

    try:
        return table_from_cells(sorted(by_share), batch_axis, length_axis, cells("prefill"), cells("decoding"))
    except ValueError as error:
        raise ConfigError(f"{path}: {where}: {error}") from error


def _seconds(cell: Mapping[str, Any], role: str, path: Path, where: str) -> float:
    value = cell.get(role, NO_VALUE)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{path}: {where}: {role}: is {quoted(value)}; milliseconds are needed")
    return NO_VALUE if value < 0 else value / 1000


def read_placement_input(path: Path) -> PlacementInput:
    """Reads a workload with its cluster, and the published plan if it has one. Raises ConfigError, see above."""
    content = _mapping(_read(path), path, "the file", "`cluster` and `models`")
    cluster = _mapping(content.get("cluster"), path, "cluster", "`nnodes` and `ngpus_per_node`")
    models = tuple(_named_model(one, path) for one in _sequence(content.get("models"), path, "models"))
    if not models:
        raise ConfigError(f"{path}: models: must not be empty")
    names = [one.name for one in models]
    if len(set(names)) < len(names):
        raise ConfigError(f"{path}: models: a name appears twice; every model needs its own")
    rates = {one.name: one for one in models}
    units = tuple(_published_unit(one, path, rates) for one in content.get("published_units", ()))
    prompt_tokens, output_tokens = (
        _number(content.get(field, default), path, field)
        for field, default in (
            ("avg_prompt_len_of_estimator", SHAREGPT_PROMPT_TOKENS),
            ("avg_output_len_of_estimator", SHAREGPT_OUTPUT_TOKENS),
        )
    )
    return PlacementInput(
        what=str(content.get("what", path.name)),
        num_nodes=_number(cluster.get("nnodes"), path, "cluster.nnodes"),
        devices_per_node=_number(cluster.get("ngpus_per_node"), path, "cluster.ngpus_per_node"),
        models=models,
        mean_prompt_tokens=prompt_tokens,
        mean_output_tokens=output_tokens,
        published_units=units,
        published_score=content.get("published_score"),
    )


def _named_model(entry: Any, path: Path) -> NamedModel:
    fields = _mapping(entry, path, "models", "`name`, `model` and `rate`")
    name, kind, rate = str(fields.get("name")), str(fields.get("model")), fields.get("rate")
    _size(kind, path)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < float("inf"):
        raise ConfigError(f"{path}: models: {named(name)}: rate: is {quoted(rate)}; requests per second are needed")
    return NamedModel(name, kind, float(rate))


def _published_unit(entry: Any, path: Path, models: Mapping[str, NamedModel]) -> PublishedUnit:
    where = "published_units"
    fields = _mapping(entry, path, where, "`num_gpus` and `models`")
    placements = []
    for one in _sequence(fields.get("models"), path, where):
        placed = _mapping(one, path, where, "`name`, `tp` and shares")
        name = str(placed.get("name"))
        if name not in models:
            raise ConfigError(f"{path}: {where}: {named(name)}: is none of `models`")
        numbers = [
            _number(placed.get(field), path, f"{where}: {name}: {field}")
            for field in ("tp", "prefill_share", "decode_share", "max_num_seqs")
        ]
        placements.append(PublishedPlacement(name, models[name].kind, *numbers))
    return PublishedUnit(_number(fields.get("num_gpus"), path, f"{where}: num_gpus"), tuple(placements))


def read_measured_runs(path: Path) -> list[MeasuredRun]:
    """Reads measured runs: a list of synthetic cases, or the three systems under one trace. Raises ConfigError."""
    content = _read(path)
    try:
        if isinstance(content, list):
            return [
                MeasuredRun(system, tuple(map(_synthetic, run["llms"])), float(case["alpha"]), float(case["scale"]))
                for case in content
                for system, run in case["systems"].items()
            ]
        return [
            MeasuredRun(system, tuple(_traced(name, fields) for name, fields in models.items()))
            for system, models in content.items()
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path}: is no file of measured runs: {type(error).__name__}: {error}") from error


def _synthetic(fields: Mapping[str, Any]) -> MeasuredModel:
    slo = {name: int(count) for name, count in fields["slo"].items()}
    return MeasuredModel(
        name=fields["id"],
        kind=fields["model"],
        throughput=float(fields["tpt"]),
        mean_ttft_s=float(fields["avg_ttft"]),
        rate_floor=int(fields["rate_floor"]),
        device=fields["dev"],
        mean_latency_s=float(fields["avg_req_latency"]),
        num_requests=slo.get("total"),
        within_slo={float(scale): count for scale, count in slo.items() if scale != "total"},
    )


def _traced(name: str, fields: Mapping[str, Any]) -> MeasuredModel:
    prefill_share, decode_share = fields["mps"]
    return MeasuredModel(
        name=name,
        kind=fields["model_name"],
        throughput=float(fields["throughput"]),
        mean_ttft_s=float(fields["first_token_latency"]),
        mean_tpot_s=float(fields["output_per_token_latency"]),
        num_requests=int(fields["request_num"]),
        tokens_per_s=float(fields["tokens_throughput"]),
        prefill_share=int(prefill_share),
        decode_share=int(decode_share),
        percentiles_s={key: float(value) for key, value in fields.items() if re.fullmatch(r"p\d+\[.*\]", key)},
        num_decode_steps=int(fields["decoding_batch_times"]),
        mean_decode_batch=float(fields["decoding_avg_batches"]),
        num_prefill_steps=int(fields["prefill_batch_times"]),
        mean_prefill_batch=float(fields["prefill_avg_batches"]),
    )


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if is_gzip else path.open("rb") as content:
            text = content.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"{path}: cannot be read: {reason}") from error
    if len(text) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_FILE_BYTES} bytes")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error


def _mapping(value: Any, path: Path, where: str, expected: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"{path}: {where}: is {quoted(value)}; an object with {expected} is needed")
    return value


def _sequence(value: Any, path: Path, where: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"{path}: {where}: is {quoted(value)}; a list is needed")
    return value


def _number(value: Any, path: Path, where: str) -> int:
    """A positive whole number, which as a key is text."""
    text = str(value)
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
        raise ConfigError(f"{path}: {where}: is {quoted(value)}; a positive whole number is needed")
    return int(text)


def _size(kind: str, path: Path) -> LlamaSize:
    if kind not in LLAMA_SIZES:
        raise ConfigError(f"{path}: model {named(kind)}: is not known; known: {', '.join(LLAMA_SIZES)}")
    return LLAMA_SIZES[kind]
