import itertools
import os
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from muxmesh.errors import ConfigError
from muxmesh.placement.measured_cells import Cell, SampleSummary, Slowdown
from muxmesh.placement.profile import MachineFacts
from muxmesh.placement.profile_file import read_profile
from muxmesh.profiler.profiled_models import ProfiledModel
from muxmesh.profiler.recorder import ProfileRecorder, only_writer, read_before
from muxmesh.types import Role
from tests.support.profiles import MACHINE, cells, sim_model

CELLS = cells("m")


def recorder(
    path: Path, *models: ProfiledModel, machine: MachineFacts = MACHINE, version: str = "1.0"
) -> ProfileRecorder:
    """Continues what is in ``path``."""
    return ProfileRecorder(path, machine, models or (sim_model(),), version, lambda: "2026-11-26", read_before(path))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "profile.yaml"


@pytest.fixture
def measured(path: Path) -> Path:
    """A file with all of `CELLS`."""
    new = recorder(path)
    for cell, summary in CELLS.items():
        new.record_cell(cell, summary)
    return path


def test_the_file_is_whole_after_each_cell(path: Path) -> None:
    new = recorder(path)
    assert not path.exists()
    for count, (cell, summary) in enumerate(CELLS.items(), 1):
        new.record_cell(cell, summary)
        assert len(read_profile(path).models["m"].samples) == count
    assert os.listdir(path.parent) == [path.name]


def test_a_file_holds_what_was_measured(measured: Path) -> None:
    profile = read_profile(measured)
    model = profile.models["m"]
    assert (profile.machine, profile.muxmesh, profile.date) == (MACHINE, "1.0", "2026-11-26")
    assert model.samples.keys() == CELLS.keys()
    assert model.tables[1].shares == (50, 100)
    for cell, summary in CELLS.items():
        assert model.samples[cell].seconds == pytest.approx(summary.seconds)
        assert model.tables[1].next_larger(cell.role, cell.share, cell.batch, cell.length) == pytest.approx(
            summary.seconds
        )
    assert model.settings is not None and model.settings.step_token_budget == 128


def test_a_run_continues_where_the_file_ends(path: Path) -> None:
    first = recorder(path)
    half = dict(itertools.islice(CELLS.items(), 5))
    for cell, summary in half.items():
        first.record_cell(cell, summary)
    second = recorder(path)
    assert {cell for cell in CELLS if not second.lacks(cell)} == set(half)
    second.record_cell(Cell("m", Role.DECODE, 25, 2, 1024), SampleSummary(1.0, 0, 1, 0))
    table = read_profile(path).models["m"].tables[1]
    assert (table.shares, table.batches, table.lengths) == ((25, 50, 100), (1, 2, 4), (64, 256, 1024))
    assert np.count_nonzero(~np.isnan(table.prefill)) + np.count_nonzero(~np.isnan(table.decode)) == 6


@pytest.mark.parametrize(
    ("machine", "model", "version", "problem"),
    [
        (replace(MACHINE, cores=4), sim_model(), "1.0", "machine.cores was 2, and is 4 now"),
        (replace(MACHINE, name="Another CPU"), sim_model(), "1.0", "machine.name was A CPU, and is Another CPU now"),
        (MACHINE, sim_model(), "1.1", "was measured by version 1.0; this is version 1.1"),
        (MACHINE, sim_model(weights="v"), "1.0", "m: settings.weights_fingerprint was w, and is v now"),
        (MACHINE, sim_model(threads=1), "1.0", "m: settings.threads was None, and is 1 now"),
        (MACHINE, sim_model(block_size=32), "1.0", "m: settings.block_size was 16, and is 32 now"),
    ],
)
def test_a_foreign_file_is_refused_by_what_differs(
    measured: Path, machine: MachineFacts, model: ProfiledModel, version: str, problem: str
) -> None:
    before = measured.read_text()
    with pytest.raises(ConfigError, match=f"(?s)^{measured}: {problem}\n.*--output, or .*--restart"):
        recorder(measured, model, machine=machine, version=version)
    assert measured.read_text() == before


def test_another_memory_limit_or_batch_cap_changes_no_time(measured: Path) -> None:
    again = recorder(measured, sim_model(max_num_seqs=3), machine=replace(MACHINE, memory_bytes=1 << 30))
    assert not again.lacks(next(iter(CELLS)))


def test_other_models_of_a_file_stay_in_it(measured: Path) -> None:
    added = recorder(measured, sim_model("n"))
    for cell, summary in cells("n").items():
        added.record_cell(cell, summary)
    profile = read_profile(measured)
    assert set(profile.models) == {"m", "n"}
    assert len(profile.models["m"].samples) == len(CELLS)


def test_slowdowns_are_recorded_and_fitted_and_those_of_a_group_replaced(measured: Path) -> None:
    new = recorder(measured)
    one, other = Cell("m", Role.DECODE, 50, 4, 256), Cell("m", Role.PREFILL, 50, 1, 64)
    assert new.lacks_group((one, other))
    new.record_slowdowns([Slowdown(one, (other,), 1.0, 1.2)])
    assert new.lacks_group((one, other))
    new.record_slowdowns([Slowdown(one, (other,), 1.0, 1.5), Slowdown(other, (one,), 2.0, 2.4)])
    again = recorder(measured)
    assert not again.lacks_group((one, other))
    assert read_profile(measured).slowdowns == tuple(again.slowdowns)
    profile = read_profile(measured)
    assert profile.contention == pytest.approx(0.7)
    assert profile.contention_error == pytest.approx(0.15)


def test_a_file_keeps_its_mode_and_a_link_to_it(measured: Path, tmp_path: Path) -> None:
    measured.chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to(measured)
    recorder(link).record_cell(*next(iter(CELLS.items())))
    assert link.is_symlink()
    assert stat.S_IMODE(measured.stat().st_mode) == 0o640


def test_only_one_run_writes_a_file(measured: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.yaml"
    link.symlink_to(measured)
    message = rf"^{link}: another `muxmesh profile` writes it \(pid {os.getpid()}\); .*--output"
    with only_writer(measured), pytest.raises(ConfigError, match=message), only_writer(link):
        pass
    with only_writer(link):
        pass
    assert set(os.listdir(tmp_path)) == {measured.name, link.name}


def test_a_folder_that_is_gone_is_named(path: Path) -> None:
    new = recorder(path.parent / "gone" / "profile.yaml")
    with pytest.raises(ConfigError, match=r"gone/profile.yaml: cannot be written: No such file"):
        new.record_cell(*next(iter(CELLS.items())))
