"""The profile that is being measured: what its file has already, and a file that is whole after each measurement.

A file is continued only if it is of this machine, this version, and models with the same weights and settings. Its
other models stay in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np

from muxmesh.errors import ConfigError
from muxmesh.file_lock import LockHeldError, file_lock
from muxmesh.file_replacement import replace_file
from muxmesh.placement.measured_cells import Cell, MeasuredSettings, SampleSummary, Slowdown, each_beside
from muxmesh.placement.profile import MachineFacts, ModelProfile, Profile
from muxmesh.placement.profile_file import format_profile, read_profile
from muxmesh.placement.step_table import StepTable
from muxmesh.profiler.interference import fit_contention
from muxmesh.profiler.profiled_models import ProfiledModel
from muxmesh.types import Role


class ProfileRecorder:
    """A `Recorder` into a file. Owns what the profile holds."""

    def __init__(
        self,
        path: Path,
        machine: MachineFacts,
        models: Sequence[ProfiledModel],
        version: str,
        date: Callable[[], str],
        before: Profile | None,
    ) -> None:
        """``before``: what the file holds, or None. ``version``: of MuxMesh. Raises ConfigError if it is foreign."""
        self._path = path
        self._machine = machine
        self._version = version
        self._date = date
        self._models = {model.source: _without_times(model) for model in models}
        self.cells: dict[Cell, SampleSummary] = {}
        self.slowdowns: list[Slowdown] = []
        if before is not None:
            _refuse_foreign(path, before, machine, self._models, version)
            self._models = {**before.models, **self._models}
            self.cells = {cell: summary for one in before.models.values() for cell, summary in one.samples.items()}
            self.slowdowns = list(before.slowdowns)

    def lacks(self, cell: Cell) -> bool:
        return cell not in self.cells

    def lacks_group(self, group: Sequence[Cell]) -> bool:
        """Whether the slowdown of any worker of ``group`` is missing."""
        return not set(each_beside(group)) <= {(one.worker, one.beside) for one in self.slowdowns}

    def record_cell(self, cell: Cell, summary: SampleSummary) -> None:
        self.cells[cell] = summary
        self.write()

    def record_slowdowns(self, slowdowns: Sequence[Slowdown]) -> None:
        replaced = {(one.worker, one.beside) for one in slowdowns}
        kept = [one for one in self.slowdowns if (one.worker, one.beside) not in replaced]
        self.slowdowns = [*kept, *slowdowns]
        self.write()

    @property
    def profile(self) -> Profile:
        """All that has been measured. Only models with a cell are in it."""
        fitted = fit_contention(self.slowdowns)
        models = {name: self._filled(model) for name, model in self._models.items()}
        return Profile(
            self._machine,
            {name: model for name, model in models.items() if model.samples or model.settings is None},
            0.0 if fitted is None else fitted.factor,
            None if fitted is None else fitted.error,
            tuple(self.slowdowns),
            self._version,
            self._date(),
        )

    def write(self) -> None:
        """Replaces the file as a whole. Does nothing before the first cell. Raises ConfigError if it cannot."""
        profile = self.profile
        if not profile.models:
            return
        try:
            _replace_keeping_mode(self._path, format_profile(profile))
        except OSError as error:
            raise ConfigError(f"{self._path}: cannot be written: {error.strerror or error}") from error

    def _filled(self, model: ModelProfile) -> ModelProfile:
        samples = {cell: summary for cell, summary in self.cells.items() if cell.model == model.name}
        if not samples:
            return model
        ordered = dict(sorted(samples.items(), key=lambda item: _place(item[0])))
        tables = {**model.tables, 1: table_of(ordered)}
        return ModelProfile(model.name, model.weights_bytes, model.kv_bytes_per_token, tables, model.settings, ordered)


def table_of(cells: dict[Cell, SampleSummary]) -> StepTable:
    """The table of the cells of one model, at least one, over the values that they have on each axis."""
    axes = [sorted({getattr(cell, name) for cell in cells}) for name in ("share", "batch", "length")]
    grids = {role: np.full([len(axis) for axis in axes], np.nan) for role in Role}
    for cell, summary in cells.items():
        index = [axis.index(value) for axis, value in zip(axes, _place(cell)[1:], strict=True)]
        grids[cell.role][tuple(index)] = summary.seconds
    shares, batches, lengths = map(tuple, axes)
    return StepTable(shares, batches, lengths, grids[Role.PREFILL], grids[Role.DECODE])


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Holds a lock beside the file while the block runs, so that two runs do not replace each other's measurements.

    Raises ConfigError if another process holds it, or the folder cannot be written.
    """
    target = Path(os.path.realpath(path))
    lock = target.with_name(f"{target.name}.lock")
    with ExitStack() as held:
        try:
            held.enter_context(file_lock(lock))
        except LockHeldError as error:
            raise ConfigError(
                f"{path}: another `muxmesh profile` writes it (pid {error.pid}); wait for it, or choose another file "
                "with --output"
            ) from None
        except OSError as error:
            raise ConfigError(f"{lock}: cannot be written: {error.strerror or error}") from error
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()


def read_before(path: Path) -> Profile | None:
    """The profile in ``path``; None if there is no file. Raises ConfigError if it cannot be read, or is none."""
    return read_profile(path) if os.path.lexists(path) else None


def _place(cell: Cell) -> tuple[str, int, int, int]:
    return cell.role.value, cell.share, cell.batch, cell.length


def _without_times(model: ProfiledModel) -> ModelProfile:
    config = model.config
    settings = MeasuredSettings(
        engine=config.engine,
        weights_fingerprint=model.prepared.weights_fingerprint,
        dtype=config.dtype,
        kv_cache_dtype=config.kv_dtype,
        block_size=config.block_size,
        step_token_budget=config.step_token_budget,
        max_num_seqs=config.max_num_seqs,
        max_model_len=model.max_model_len,
        threads=config.threads,
        cuda_graphs=config.cuda_graphs,
        continuous_decode_steps=config.continuous_decode_steps,
    )
    return ModelProfile(model.source, model.weights_bytes, model.shape.kv_bytes_per_token, {}, settings)


def _refuse_foreign(
    path: Path, before: Profile, machine: MachineFacts, models: dict[str, ModelProfile], version: str
) -> None:
    """Raises ConfigError with each difference between what the file is of and what is measured now."""
    differing = list(_differences(before, machine, models, version))
    if differing:
        raise ConfigError(
            "\n".join(f"{path}: {one}" for one in differing)
            + f"\n{path}: cannot be continued: choose another file with --output, or measure all again with --restart"
        )


def _differences(
    before: Profile, machine: MachineFacts, models: dict[str, ModelProfile], version: str
) -> Iterator[str]:
    if before.muxmesh != version:
        by = f"version {before.muxmesh}" if before.muxmesh else "another program"
        yield f"was measured by {by}; this is version {version}"
    yield from (f"machine.{one}" for one in _changed(asdict(before.machine).items(), asdict(machine)))
    for name, model in models.items():
        if (other := before.models.get(name)) is None or model.settings is None:
            continue
        if other.settings is None:
            yield f"{name}: has no settings, so it was not measured by `muxmesh profile`"
            continue
        changed = _changed(asdict(other.settings).items(), asdict(model.settings))
        yield from (f"{name}: settings.{one}" for one in changed)


_MAY_CHANGE = ("memory_bytes", "max_num_seqs", "max_model_len")
"""They bound what is measured, and change no time."""


def _changed(before: Iterable[tuple[str, object]], now: dict[str, object]) -> Iterator[str]:
    for name, value in before:
        if now[name] != value and name not in _MAY_CHANGE:
            yield f"{name} was {value}, and is {now[name]} now"


def _replace_keeping_mode(path: Path, text: str) -> None:
    """Replaces a file, which keeps its mode; ``path`` may be a link to it. Raises OSError."""
    target = Path(os.path.realpath(path))
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
    replace_file(target, text, mode, sync=True)


def _umask() -> int:
    """The mask of new files, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
