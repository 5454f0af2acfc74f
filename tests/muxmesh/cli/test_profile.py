"""`muxmesh profile`: arguments, files, and whole runs of the sim engine."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from muxmesh.cli.main import main
from muxmesh.placement.profile_file import read_profile
from muxmesh.types import Role

MESH = """
units:
- models:
  - {name: a, engine: sim, max_num_seqs: 2, max_model_len: 512, sim: {base_s: 0.004}}
"""
QUICK = ("--shares", "50,100", "--batches", "1,2", "--lengths", "64", "--repeats", "2", "--cell-seconds", "0.05")
NUM_CELLS = 8


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a mesh.yaml of one sim model."""
    (tmp_path / "mesh.yaml").write_text(MESH)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_that_is_interrupted_leaves_a_valid_file_which_the_next_one_continues(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = (*QUICK[:-3], "1000", "--cell-seconds", "1")  # each cell takes a second
    command = (sys.executable, "-m", "muxmesh", "profile", "-c", "mesh.yaml", *slow)
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "measured 3/" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    found = re.search(r"interrupted; profile.yaml has (\d+) of 10 measurements, and the same command continues", error)
    assert found is not None
    num_done = int(found[1])
    assert 3 <= num_done < 10
    profile = read_profile(folder / "profile.yaml")
    assert len(profile.models["a"].samples) == min(num_done, NUM_CELLS)

    assert main(["profile", "-c", "mesh.yaml", *QUICK, "--json", "--no-interference"]) == 0
    out, error = capsys.readouterr()
    summary = json.loads(out)
    assert f"profile.yaml has {num_done} of {NUM_CELLS} measurements" in error
    assert (summary["measurements"], summary["left"], summary["models"]["a"]["cells"]) == (NUM_CELLS, 0, NUM_CELLS)
    table = read_profile(folder / "profile.yaml").models["a"].tables[1]
    assert (table.shares, table.batches, table.lengths) == ((50, 100), (1, 2), (64,))
    assert table.next_larger(Role.DECODE, 100, 2, 64) >= 0.004

    assert main(["profile", "-c", "mesh.yaml", *QUICK, "--no-interference", "--quiet"]) == 0  # nothing is left
    assert main(["profile", "--show", "profile.yaml"]) == 0
    again, shown = capsys.readouterr().out.split("profile.yaml: ")[1:]
    assert again.splitlines()[2:] == shown.splitlines()[2:]
    assert main(["profile", "--show", "profile.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"]["a"]["cells"] == NUM_CELLS
    assert "a: 512 bytes of KV per token" in shown and "contention: not measured" in shown

    (folder / "mesh.yaml").write_text(MESH.replace("0.004", "0.005"))
    assert main(["profile", "-c", "mesh.yaml", *QUICK]) == 1
    assert "a: settings.weights_fingerprint was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["--shares", "0,50"], 2, "'0,50' is not a list of whole numbers from 1 to 100, such as 1,2,4"),
        (["--batches", "1,x"], 2, "'1,x' is not a list of whole numbers of at least 1"),
        (["--repeats", "0"], 2, "'0' is not a whole number of at least 1"),
        (["--budget", "-1"], 2, "'-1' is not a number of seconds above 0"),
        (["--show", "none.yaml"], 1, "none.yaml: cannot be read: No such file or directory"),
        (["--show", "none.yaml", "-c", "mesh.yaml"], 1, "--show: prints a file that is there; leave out the models"),
        (["-c", "mesh.yaml", "-o", "none/profile.yaml"], 1, "the folder none does not exist"),
        (["-c", "mesh.yaml", "-o", "mesh.yaml"], 1, "mesh.yaml: is no profile: it has no `machine`; `muxmesh profile`"),
        (["--show", "mesh.yaml"], 1, "mesh.yaml: is no profile: it has no `machine`; `muxmesh profile` writes one"),
        (["-c", "mesh.yaml", "--unit", "u"], 1, "--unit: no unit has the name u; units: unit0"),
        (["-c", "mesh.yaml", "some/model"], 1, "--config: names the models to profile"),
        (["-c", "mesh.yaml", "--device", "cpu"], 1, "--device: is for models that are named"),
        (["--unit", "unit0"], 1, "--unit: is a unit of a mesh.yaml; name the file with --config"),
        (["-c", "mesh.yaml", "--lengths", "4096"], 1, "a: has no cell: it computes batches of at most 2 sequences"),
        (["none", "none"], 1, "MODEL: the same model is named twice"),
        (["./none"], 1, "'./none' is neither a folder, nor a .gguf file, nor in the catalog"),
        (["x", "--device", "gpu"], 2, "'gpu' is neither cpu nor cuda:N"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_measured(
    folder: Path, arguments: list[str], code: int, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", *arguments]) == code
    assert problem.replace("'", "") in capsys.readouterr().err.replace("'", "")
    assert not (folder / "profile.yaml").exists()
