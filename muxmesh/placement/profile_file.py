"""The file of `muxmesh profile`: step tables of models, facts of the machine, contention. YAML, in seconds and bytes.

Knows the file's fields and their limits; what they mean is in `profile` and `step_table`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import ByteSize, Field, ValidationError, model_validator

from muxmesh.config.field_errors import field_errors
from muxmesh.config.section import MAX_BYTES, MAX_COUNT, Section
from muxmesh.errors import ConfigError
from muxmesh.placement.measured_cells import MAX_CONTENTION, Cell, MeasuredSettings, SampleSummary, Slowdown
from muxmesh.placement.profile import MachineFacts, ModelProfile, Profile
from muxmesh.placement.step_table import NO_VALUE, Grid, StepTable, table_from_cells
from muxmesh.quoting import named, one_line
from muxmesh.types import Role

VERSION = 1
MAX_FILE_BYTES = 16 * 1024 * 1024
_DIGITS = 7
"""Significant digits of a time in a file."""

Axis = Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_COUNT)], ...], Field(min_length=1, max_length=1024)]
Cells = tuple[tuple[tuple[Annotated[float, Field(ge=-1, le=86400)], ...], ...], ...]


class MachineSection(Section):
    """The machine that was measured."""

    device: Literal["cpu", "cuda"]
    """Kind of device."""
    name: str = Field(max_length=256)
    """The device as its vendor calls it."""
    num_devices: int = Field(default=1, ge=1, le=100_000)
    """Devices of this kind in the machine."""
    memory: ByteSize = Field(ge=1, le=MAX_BYTES)
    """Memory of one device, for weights, KV and workers."""
    cores: int = Field(default=0, ge=0, le=MAX_COUNT)
    """CPU cores that units divide among themselves; 0 for GPUs."""


class TableSection(Section):
    """Step times at one tensor-parallel degree, as lists for each share, of lists for each batch, by length."""

    tensor_parallel: int = Field(default=1, ge=1, le=1024)
    """Devices that compute each step together."""
    shares: Axis
    """Percent of the device, ascending."""
    batches: Axis
    """Sequences, ascending."""
    lengths: Axis
    """Tokens of a prompt (prefill) or of context (decode), ascending."""
    prefill_s: Cells
    """Seconds of a step that computes `batch` prompts of `length` tokens. -1: no value."""
    decode_s: Cells
    """Seconds of a step that computes one token of `batch` sequences with `length` tokens of context. -1: no value."""

    @model_validator(mode="after")
    def _cells_fit_axes(self) -> Self:
        self.table()
        return self

    def table(self) -> StepTable:
        return table_from_cells(self.shares, self.batches, self.lengths, self.prefill_s, self.decode_s)


Sample = tuple[
    Role,
    Annotated[int, Field(ge=1, le=100)],
    Annotated[int, Field(ge=1, le=MAX_COUNT)],
    Annotated[int, Field(ge=1, le=MAX_COUNT)],
    Annotated[float, Field(ge=0, le=86400)],
    Annotated[int, Field(ge=1, le=MAX_COUNT)],
    Annotated[int, Field(ge=0, le=MAX_COUNT)],
]
"""Role, share, batch and length of a cell; the spread of its samples relative to their median, how many they are, and
how many of them are outliers."""


class SettingsSection(Section):
    """What the times of a model depend on beside the machine, as in mesh.yaml."""

    engine: str = Field(max_length=64)
    """Engine that computed the steps."""
    weights_fingerprint: str = Field(max_length=4096)
    """Identifies the weights and their data type."""
    dtype: str = Field(max_length=64)
    """Data type of weights and activations."""
    kv_cache_dtype: str = Field(max_length=64)
    """Data type of KV."""
    block_size: int = Field(ge=1, le=MAX_COUNT)
    """Tokens in a KV block."""
    step_token_budget: int = Field(ge=1, le=MAX_COUNT)
    """Prompt tokens computed in one step: a longer prefill takes several."""
    max_num_seqs: int = Field(ge=1, le=MAX_COUNT)
    """Largest batch of a decode step."""
    max_model_len: int = Field(ge=1, le=MAX_COUNT)
    """Longest prompt and output together, in tokens."""
    threads: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    """Threads of each worker on a CPU, if they were set."""
    cuda_graphs: bool = True
    """Whether decode steps on a GPU were captured."""
    continuous_decode_steps: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    """Decode steps in a row, if they were set."""


class WorkerSection(Section):
    """What one worker computed in a measurement of several side by side."""

    model: str = Field(min_length=1, max_length=4096)
    """Name of the model in this file."""
    role: Role
    """`prefill` or `decode`."""
    share: int = Field(ge=1, le=100)
    """Percent of the device."""
    batch: int = Field(ge=1, le=MAX_COUNT)
    """Prompts or sequences."""
    length: int = Field(ge=1, le=MAX_COUNT)
    """Tokens of each prompt, or of context."""

    def cell(self) -> Cell:
        return Cell(self.model, self.role, self.share, self.batch, self.length)


class SlowdownSection(Section):
    """One worker alone and beside others."""

    worker: WorkerSection
    """The worker that was timed."""
    beside: tuple[WorkerSection, ...] = Field(min_length=1, max_length=64)
    """Those that computed at the same time."""
    alone_s: float = Field(gt=0, le=86400)
    """Median seconds alone."""
    beside_s: float = Field(gt=0, le=86400)
    """Median seconds beside the others."""


class ModelSection(Section):
    """One model."""

    name: str = Field(min_length=1, max_length=4096)
    """The `source` of the model in mesh.yaml."""
    weights: ByteSize = Field(ge=1, le=MAX_BYTES)
    """Bytes of all weights in the profiled data type."""
    kv_bytes_per_token: int = Field(ge=1, le=MAX_BYTES)
    """K and V of one token over all layers and heads."""
    tables: tuple[TableSection, ...] = Field(min_length=1)
    """One for each tensor-parallel degree."""
    settings: SettingsSection | None = None
    """Of the model when it was measured by `muxmesh profile`."""
    samples: tuple[Sample, ...] = ()
    """How sure each measured cell is: [role, share, batch, length, spread, repeats, outliers]."""

    def measured(self, table: StepTable | None) -> Iterator[tuple[Cell, SampleSummary]]:
        """The measured cells with their seconds in ``table``, that of tensor_parallel 1; None: there is none.

        Raises ValueError for a cell that has no seconds in it.
        """
        if not self.samples:
            return
        if table is None:
            raise ValueError("samples: are of tensor_parallel 1, which has no table")
        for role, share, batch, length, spread, repeats, outliers in self.samples:
            try:
                index = table.shares.index(share), table.batches.index(batch), table.lengths.index(length)
            except ValueError:
                raise ValueError(f"samples: {role}, {share}, {batch}, {length}: is no cell of the table") from None
            seconds = float(table.grid(role)[index])
            if math.isnan(seconds):
                raise ValueError(f"samples: {role}, {share}, {batch}, {length}: has no seconds in the table")
            yield Cell(self.name, role, share, batch, length), SampleSummary(seconds, spread, repeats, outliers)


class ProfileSection(Section):
    """The root of a profile."""

    version: Literal[1] = 1
    """Of the file format."""
    machine: MachineSection
    """Where it was measured."""
    contention: float = Field(default=0.0, ge=0, le=MAX_CONTENTION)
    """A step takes `1 + contention * o` times as long while other workers compute whose shares sum to o (0..1)."""
    contention_error: float | None = Field(default=None, ge=0, le=1000)
    """Root of the mean squared error of the slowdowns by `contention`."""
    muxmesh: str = Field(default="", max_length=256)
    """Version of MuxMesh that measured."""
    date: str = Field(default="", max_length=64)
    """Of the last measurement."""
    models: tuple[ModelSection, ...] = Field(min_length=1)
    """The measured models."""
    slowdowns: tuple[SlowdownSection, ...] = ()
    """Measurements of workers side by side, which `contention` is fitted to."""


def read_profile(path: Path) -> Profile:
    """Reads a profile. Raises ConfigError, which names the file, the field, what is wrong and what would be right."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be read: {reason}; `muxmesh profile` writes a profile") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_FILE_BYTES} bytes, the limit of a profile")
    return parse_profile(content, str(path))


def parse_profile(content: bytes | str, origin: str) -> Profile:
    """Like `read_profile`, from the content of a file. Error messages start with ``origin``."""
    try:
        data = yaml.load(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - a safe loader
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigError(f"{origin}: is not YAML: {one_line(' '.join(str(error).split()))[:200]}") from error
    if not isinstance(data, dict) or "machine" not in data:
        raise ConfigError(f"{origin}: is no profile: it has no `machine`; `muxmesh profile` writes one")
    try:
        section = ProfileSection.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_described(error, origin)) from error
    return _profile(section, origin)


def _profile(section: ProfileSection, origin: str) -> Profile:
    models: dict[str, ModelProfile] = {}
    for model in section.models:
        tables = {one.tensor_parallel: one.table() for one in model.tables}
        if model.name in models or len(tables) < len(model.tables):
            what = "tensor_parallel" if model.name not in models else "name"
            raise ConfigError(f"{origin}: models: {named(model.name)}: has the same {what} twice; once is needed")
        try:
            samples = dict(model.measured(tables.get(1)))
        except ValueError as error:
            raise ConfigError(f"{origin}: models: {named(model.name)}: {error}") from None
        settings = None if model.settings is None else MeasuredSettings(**model.settings.model_dump())
        models[model.name] = ModelProfile(
            model.name, model.weights, model.kv_bytes_per_token, tables, settings, samples
        )
    machine = section.machine
    facts = MachineFacts(machine.device, machine.name, machine.num_devices, machine.memory, machine.cores)
    slowdowns = tuple(
        Slowdown(one.worker.cell(), tuple(other.cell() for other in one.beside), one.alone_s, one.beside_s)
        for one in section.slowdowns
    )
    return Profile(
        facts, models, section.contention, section.contention_error, slowdowns, section.muxmesh, section.date
    )


def format_profile(profile: Profile) -> str:
    """The content of the file for ``profile``, one line of numbers for each share and batch."""
    machine = profile.machine
    lines = [
        "# Step times of models on one machine, in seconds; -1 is no value. Written by `muxmesh profile`.",
        f"version: {VERSION}",
        "machine:",
        f"  device: {machine.device}",
        f"  name: {_text(machine.name)}",
        f"  num_devices: {machine.num_devices}",
        f"  memory: {machine.memory_bytes}",
        f"  cores: {machine.cores}",
        f"contention: {profile.contention:.{_DIGITS}g}",
    ]
    if profile.contention_error is not None:
        lines.append(f"contention_error: {profile.contention_error:.{_DIGITS}g}")
    if profile.muxmesh:
        lines += [f"muxmesh: {_text(profile.muxmesh)}", f"date: {_text(profile.date)}"]
    lines.append("models:")
    for model in profile.models.values():
        lines += [
            f"- name: {_text(model.name)}",
            f"  weights: {model.weights_bytes}",
            f"  kv_bytes_per_token: {model.kv_bytes_per_token}",
            "  tables:",
        ]
        for degree, table in sorted(model.tables.items()):
            lines += _table_lines(degree, table)
        if model.settings is not None:
            lines += [
                "  settings:",
                *(f"    {name}: {_value(value)}" for name, value in asdict(model.settings).items()),
            ]
        if model.samples:
            lines += ["  samples:", *map(_sample_line, model.samples.items())]
    if profile.slowdowns:
        lines += ["slowdowns:", *(line for one in profile.slowdowns for line in _slowdown_lines(one))]
    return "\n".join(lines) + "\n"


def _sample_line(measured: tuple[Cell, SampleSummary]) -> str:
    cell, summary = measured
    place = f"{cell.role}, {cell.share}, {cell.batch}, {cell.length}"
    return f"  - [{place}, {summary.spread:.2g}, {summary.repeats}, {summary.outliers}]"


def _slowdown_lines(slowdown: Slowdown) -> list[str]:
    return [
        f"- worker: {_worker(slowdown.worker)}",
        "  beside:",
        *(f"  - {_worker(other)}" for other in slowdown.beside),
        f"  alone_s: {slowdown.alone_s:.{_DIGITS}g}",
        f"  beside_s: {slowdown.beside_s:.{_DIGITS}g}",
    ]


def _worker(cell: Cell) -> str:
    place = f"role: {cell.role}, share: {cell.share}, batch: {cell.batch}, length: {cell.length}"
    return f"{{model: {_text(cell.model)}, {place}}}"


def _value(value: object) -> str:
    return _text(value) if isinstance(value, str) else json.dumps(value)


def _table_lines(degree: int, table: StepTable) -> list[str]:
    return [
        f"  - tensor_parallel: {degree}",
        f"    shares: {list(table.shares)}",
        f"    batches: {list(table.batches)}",
        f"    lengths: {list(table.lengths)}",
        "    prefill_s:",
        *_grid_lines(table.grid(Role.PREFILL)),
        "    decode_s:",
        *_grid_lines(table.grid(Role.DECODE)),
    ]


def _grid_lines(grid: Grid) -> list[str]:
    """A list of lists for each share, with a line for each batch."""
    lines = []
    for of_share in grid.tolist():
        for index, of_batch in enumerate(of_share):
            cells = ", ".join(f"{NO_VALUE if math.isnan(cell) else cell:.{_DIGITS}g}" for cell in of_batch)
            lines.append(f"    {'- ' if index == 0 else '  '}- [{cells}]")
    return lines


def _text(value: str) -> str:
    """A YAML scalar on one line."""
    return yaml.safe_dump(value, width=1 << 20, allow_unicode=True, default_style='"').strip()


def _described(error: ValidationError, origin: str) -> str:
    """The first invalid fields of a profile, one a line."""
    found = [(location, problem) for location, problem in field_errors(error, ProfileSection) if problem is not None]
    return "\n".join(f"{origin}: {'.'.join(map(str, location))}: {problem}" for location, problem in found[:10])
