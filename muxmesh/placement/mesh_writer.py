"""Writes a plan as mesh.yaml, with reasons and estimates as comments. Pure: from values to text.

Knows the fields of mesh.yaml that a plan decides, and those that step times depend on, which are as they were measured.
All others keep their defaults.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import yaml

from muxmesh.config.model_config import ModelConfig, SimProfile
from muxmesh.config.schema import UnitConfig
from muxmesh.config.section import MIB
from muxmesh.config.slo_config import SloConfig
from muxmesh.placement.corrected_estimator import CorrectedEstimator, ModelEstimate, UnitEstimate
from muxmesh.placement.measured_cells import MeasuredSettings
from muxmesh.placement.plan import Cluster, ModelLoad, PlacedModel, PlacedUnit, Plan
from muxmesh.quoting import one_line

_SLAB: int = UnitConfig.model_fields["slab"].default
_BLOCK_TOKENS: int = ModelConfig.model_fields["block_size"].default
_POOL_HEADROOM = 4
"""On a CPU: the pool is this multiple of what the batch caps need at mean lengths. Sequences differ in length."""
_FIRST_PORT = 50100
_GPU_DTYPE = "float16"
"""Of models whose times are not from `muxmesh profile`: that of MuxServe's profile."""
_GPU_PREFILL = 2048
"""Their prefill token budget: about the fewest prompt tokens in a step that keep a GPU busy."""
_LEAST_SLABS = 2
"""Of each model in a pool on a CPU at least, since a slab holds blocks of one model."""


@dataclass(frozen=True, slots=True)
class MeshTarget:
    """What a mesh.yaml needs beside the plan."""

    cluster: Cluster
    is_cpu: bool
    """Units are on cores: a device of the plan is one core."""
    sources: Mapping[str, str]
    """Model → `source`, where it is not the name."""
    slos: Mapping[str, SloConfig]
    settings: Mapping[str, MeasuredSettings] = field(default_factory=dict)
    """Model → settings that its times hold for; none for times that are not from `muxmesh profile`."""
    hosts: Sequence[str] = ()
    """One for each node; empty: `node0`, `node1`, ..."""


def mesh_yaml(plan: Plan, corrected: CorrectedEstimator, target: MeshTarget, reasons: Sequence[str]) -> str:
    """The text of mesh.yaml for ``plan``. ``reasons`` are lines of the comment at its head."""
    lines = [f"# {one_line(reason)}" for reason in reasons]
    lines.append("units:")
    for index, (unit, node, device) in enumerate(_located(plan, target.cluster)):
        needed = sum(one.max_num_seqs * corrected.sequence_bytes(one.load) for one in unit.models)
        block = _BLOCK_TOKENS * max(corrected.kv_bytes_per_token(one.load.kind) for one in unit.models)
        lines += _unit_lines(index, unit, node, device, corrected.estimate(unit), needed, block, target)
    return "\n".join(lines) + "\n"


def _located(plan: Plan, cluster: Cluster) -> Iterator[tuple[PlacedUnit, int, int]]:
    """Units with their node and first device, the largest first, so that powers of two fit without gaps."""
    units = sorted(plan.units, key=lambda one: -one.num_devices)
    places = cluster.first_fit(unit.num_devices for unit in units)
    assert places is not None, "a plan of the search fits its cluster"
    for unit, (node, device) in zip(units, places, strict=True):
        yield unit, node, device


def _unit_lines(
    index: int,
    unit: PlacedUnit,
    node: int,
    device: int,
    estimate: UnitEstimate | None,
    needed_bytes: float,
    block_bytes: float,
    target: MeshTarget,
) -> Iterator[str]:
    assert estimate is not None, "a plan of the search fits its memory"
    yield f"- name: unit{index}"
    if estimate.prefill_part:
        yield f"  # Prefills take {estimate.prefill_part:.0%} of the time."
    if target.is_cpu:
        yield f"  cores: {list(range(device, device + unit.num_devices))}"
    else:
        yield f"  device: cuda:{device}"
        if unit.num_devices > 1:
            yield f"  tensor_parallel: {unit.num_devices}"
    num_parts = 1 if target.is_cpu else unit.num_devices
    slab = _slab_bytes(block_bytes / num_parts)
    pool = _kv_pool_bytes(estimate.kv_bytes // num_parts, slab)
    if target.is_cpu:  # memory that others of the machine use too
        least = _LEAST_SLABS * len(unit.models) * slab
        pool = _kv_pool_bytes(min(pool // 2, max(least, int(_POOL_HEADROOM * needed_bytes))), slab)
    yield f"  kv_pool: {pool // MIB}MiB"
    if slab != _SLAB:
        yield f"  slab: {slab // MIB}MiB"
    if target.cluster.num_nodes > 1:
        host = target.hosts[node] if target.hosts else f"node{node}"
        yield f"  network: {{host: {host}, base_port: {_FIRST_PORT + 64 * index}, allow_unencrypted: true}}"
    yield f"  arbiter: {{mode: adbs, over_subscription: {target.cluster.over_subscription}}}"
    yield "  models:"
    guaranteed = _guaranteed(unit, pool, slab)
    for model, one, least in zip(unit.models, estimate.models, guaranteed, strict=True):
        yield from _model_lines(model, one, least, target)


def _model_lines(model: PlacedModel, estimate: ModelEstimate, guaranteed: int, target: MeshTarget) -> Iterator[str]:
    """``guaranteed``: bytes of KV; 0: none."""
    name = model.load.name
    yield f"  - name: {_scalar(name)}"
    yield f"    # {_described(model.load, estimate)}"
    if target.sources.get(name, name) != name:
        yield f"    source: {_quoted(target.sources[name])}"
    for key, value in _settings(target, name).items():
        yield f"    {key}: {value}"
    yield f"    compute_share: {{prefill: {model.prefill_share}, decode: {model.decode_share}}}"
    yield f"    max_num_seqs: {model.max_num_seqs}"
    yield f"    expected_rate: {model.load.rate:.6g}"
    if guaranteed:
        yield f"    kv_guaranteed: {guaranteed // MIB}MiB"
    slo = target.slos.get(name)
    if slo is not None:
        fields = ", ".join(f"{key}: {value:g}" for key, value in slo.model_dump(exclude_none=True).items())
        yield f"    slo: {{{fields}}}"


def _settings(target: MeshTarget, name: str) -> dict[str, object]:
    """The fields of a model that its times depend on, where they differ from the defaults."""
    measured = target.settings.get(name)
    if measured is None:
        return {} if target.is_cpu else {"dtype": _GPU_DTYPE, "prefill_token_budget": _GPU_PREFILL}
    fields: dict[str, object] = {
        "engine": measured.engine,
        "dtype": measured.dtype,
        "kv_cache_dtype": "auto" if measured.kv_cache_dtype == measured.dtype else measured.kv_cache_dtype,
        "block_size": measured.block_size,
        "prefill_token_budget": measured.step_token_budget,
        "cuda_graphs": measured.cuda_graphs,
        "continuous_decode_steps": measured.continuous_decode_steps,
    }
    found = {one: value for one, value in fields.items() if value != ModelConfig.model_fields[one].default}
    if measured.engine == "sim":
        steps = SimProfile.from_fingerprint(measured.weights_fingerprint).model_dump(exclude_defaults=True)
        found["sim"] = yaml.safe_dump(steps, default_flow_style=True, width=1 << 20).strip()
    return found


def _kv_pool_bytes(free_bytes: int, slab: int) -> int:
    """The pool of a unit: what is free, in whole slabs."""
    return max(slab, free_bytes // slab * slab)


def _slab_bytes(block_bytes: float) -> int:
    """A slab that holds at least four of a unit's largest token blocks: of the default size, or 2, 4, ... times it."""
    slab = _SLAB
    while slab < 4 * block_bytes:
        slab *= 2
    return slab


def _guaranteed(unit: PlacedUnit, pool: int, slab: int) -> list[int]:
    """Half of the pool, in proportion to the tokens of the models' sequences; the other half is lent by use."""
    needs = [one.max_num_seqs * (one.load.prompt_tokens + one.load.output_tokens) for one in unit.models]
    if len(needs) == 1:
        return [0]
    return [int(pool / 2 * need / sum(needs)) // slab * slab for need in needs]


def _described(load: ModelLoad, estimate: ModelEstimate) -> str:
    """The load and the estimate of a model in one line."""
    ttft = "grows without limit" if math.isinf(estimate.ttft_s) else f"{estimate.ttft_s:.3g} s"
    return (
        f"{load.rate:.4g} requests/s of {load.prompt_tokens:.0f} + {load.output_tokens:.0f} tokens: serves "
        f"{estimate.throughput:.4g}/s, TTFT {ttft}, TPOT {estimate.tpot_s * 1000:.3g} ms, "
        f"SLO met by {estimate.attainment:.0%}"
    )


def _scalar(text: str) -> str:
    """A name, in quotation marks where YAML would read a number or the like."""
    return text if yaml.safe_load(text) == text else _quoted(text)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
