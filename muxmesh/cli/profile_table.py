"""A profile as a table for people: milliseconds by share, batch and length, and what side by side costs. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

from muxmesh.cli.text_table import aligned
from muxmesh.placement.profile import ModelProfile, Profile
from muxmesh.placement.step_table import StepTable
from muxmesh.types import Role

_TITLES = {Role.PREFILL: "prefill of all prompts", Role.DECODE: "one decode step"}


def render(profile: Profile, name: str) -> str:
    """The whole profile; ``name``: that of its file."""
    machine = profile.machine
    cores = f", {machine.cores} cores" if machine.cores else ""
    number = f", {machine.num_devices} devices" if machine.num_devices > 1 else ""
    by = f", MuxMesh {profile.muxmesh}, {profile.date}" if profile.muxmesh else ""
    lines = [f"{name}: {machine.name}{cores}{number}, {machine.memory_bytes / 2**30:.1f} GiB{by}"]
    for model in profile.models.values():
        lines += ["", *_model_lines(model)]
    lines += ["", *_contention_lines(profile)]
    return "\n".join(lines)


def _model_lines(model: ModelProfile) -> Iterator[str]:
    size = f"{model.weights_bytes / 2**20:.0f} MiB of weights, " if model.weights_bytes > 1 else ""
    yield f"{model.name}: {size}{model.kv_bytes_per_token} bytes of KV per token"
    for degree, table in sorted(model.tables.items()):
        on = f" on {degree} devices" if degree > 1 else ""
        for role in Role:
            yield f"  {_TITLES[role]}{on}, ms"
            yield from (f"  {line}" for line in aligned(list(_rows(table, role)), str.rjust))
    if model.samples:
        total = sum(one.repeats for one in model.samples.values())
        yield (
            f"  {len(model.samples)} cells, median spread {model.median_spread:.1%}, {model.num_outliers} of {total} "
            "samples are outliers"
        )


def _rows(table: StepTable, role: Role) -> Iterator[list[str]]:
    yield ["share", "batch", *(f"length {length}" for length in table.lengths)]
    for share, of_share in zip(table.shares, table.grid(role).tolist(), strict=True):
        for batch, of_batch in zip(table.batches, of_share, strict=True):
            if not all(map(math.isnan, of_batch)):
                yield [f"{share} %", str(batch), *map(_milliseconds, of_batch)]


def _milliseconds(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    return f"{seconds * 1000:.0f}" if seconds >= 0.1 else f"{seconds * 1000:.3g}"


def _contention_lines(profile: Profile) -> Iterator[str]:
    if profile.contention_error is None:
        yield f"contention {profile.contention:.2f}" if profile.contention else "contention: not measured"
        return
    yield (
        f"contention {profile.contention:.2f}: beside others whose shares sum to o, a step takes 1 + "
        f"{profile.contention:.2f} o times as long (error of a slowdown: {profile.contention_error:.2f})"
    )
    rows = [["slowdown", "worker", "beside"]]
    for one in profile.slowdowns:
        worker, *others = (f"{cell.model} {cell.role} {cell.share} %" for cell in (one.worker, *one.beside))
        rows.append([f"{one.ratio:.2f}", worker, ", ".join(others)])
    yield from (f"  {line}" for line in aligned(rows))
