import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxmesh.cli.common import (
    ProgressBar,
    cache_dir,
    default_state_dir,
    print_json,
    refuse_unwritable,
    source_dir,
)
from muxmesh.errors import ConfigError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("directory", "own", "xdg", "default"),
    [
        (cache_dir, "MUXMESH_CACHE_DIR", "XDG_CACHE_HOME", ".cache/muxmesh"),
        (default_state_dir, "MUXMESH_STATE_DIR", "XDG_STATE_HOME", ".local/state/muxmesh"),
    ],
)
def test_a_directory_is_that_of_muxmesh_else_that_of_xdg_else_in_the_home_directory(
    directory: Callable[[], Path], own: str, xdg: str, default: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.setenv(own, "~/own")
    monkeypatch.setenv(xdg, "/xdg")
    assert directory() == Path("/home/user/own")
    monkeypatch.setenv(own, "")
    assert directory() == Path("/xdg/muxmesh")
    monkeypatch.delenv(xdg)
    assert directory() == Path("/home/user") / default


def test_a_home_directory_that_is_unknown_is_no_error() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUXMESH_STATE_DIR", "~nobody-has-this-name/x")
        assert default_state_dir() == Path("~nobody-has-this-name/x")


def test_sources_are_relative_to_the_file_that_a_link_leads_to_and_for_a_pipe_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mesh.yaml").touch()
    (tmp_path / "link.yaml").symlink_to("folder/mesh.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    os.mkfifo(tmp_path / "folder" / "pipe")
    monkeypatch.chdir(tmp_path)
    assert source_dir(Path("link.yaml")) == tmp_path / "folder"
    assert [source_dir(path) for path in (None, Path("folder/pipe"), Path("loop.yaml"))] == [tmp_path] * 3


def test_a_current_directory_that_has_been_deleted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ConfigError, match="the current directory has been deleted"):
        source_dir(None)


def test_json_is_one_line_for_programs_and_indented_for_people(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"text": "ä", "numbers": [1, 2]}
    print_json(content)
    assert capsys.readouterr().out == '{"text": "ä", "numbers": [1, 2]}\n'
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    print_json(content)
    assert len(terminal.getvalue().splitlines()) > 1 and json.loads(terminal.getvalue()) == content


def test_json_has_null_for_what_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"ttft_s": math.inf, "all": [(1.5, math.nan)]})
    assert capsys.readouterr().out == '{"ttft_s": null, "all": [[1.5, null]]}\n'


def test_progress_off_a_terminal_is_a_line_for_each_quarter(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar("model")
    for done in range(101):
        bar("converting", done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"model: converting {done}/100" for done in (0, 25, 50, 75, 100)]


def test_progress_begins_again_with_each_phase(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar("model")
    for phase in ("downloading", "converting"):
        bar(phase, 1, 2)
        bar(phase, 1, 2)
    assert capsys.readouterr().err == "model: downloading 1/2\nmodel: converting 1/2\n"


def test_a_note_follows_the_amount_and_only_a_terminal_shows_each_change(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = ProgressBar("profile")
    bar("measured", 1, 8, "3 min left")
    bar("measured", 1, 8, "2 min left")
    assert capsys.readouterr().err == "profile: measured 1/8, 3 min left\n"
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    on_terminal = ProgressBar("profile")
    for note in ("3 min left", "2 min left", "2 min left"):
        on_terminal("measured", 1, 8, note)
    assert terminal.getvalue().count("1/8, ") == 2


def test_large_totals_are_megabytes(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressBar("model")("downloading", 1_500_000, 6_000_000)
    assert capsys.readouterr().err == "model: downloading 1.5/6.0 MB\n"


def test_a_total_of_zero_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressBar("model")("converting", 0, 0)
    assert capsys.readouterr().err == "model: converting 0/0\n"


def test_progress_on_a_terminal_rewrites_one_line_until_it_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    bar = ProgressBar("model")
    for done in (0, 1, 2):
        bar("converting", done, 2)
    assert terminal.getvalue() == (
        f"\rmodel: converting [{'-' * 32}] 0/2\x1b[K"
        f"\rmodel: converting [{'#' * 16}{'-' * 16}] 1/2\x1b[K"
        f"\rmodel: converting [{'#' * 32}] 2/2\x1b[K\n"
    )


@settings(max_examples=30)
@given(total=st.integers(1, 10**9), parts=st.lists(st.floats(0, 1), max_size=30))
def test_a_terminal_is_redrawn_at_most_once_per_percent(total: int, parts: list[float]) -> None:
    terminal = Terminal()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("sys.stderr", terminal)
        bar = ProgressBar("model")
        for part in sorted([*parts, *parts]):
            bar("downloading", int(part * total), total)
    percents = {int(part * total) * 100 // total for part in parts}
    assert terminal.getvalue().count("\r") == len(percents)


def test_paths_that_can_be_written_are_accepted(tmp_path: Path) -> None:
    existing = tmp_path / "existing"
    existing.write_text("kept")
    refuse_unwritable(None, existing, tmp_path / "new")
    assert existing.read_text() == "kept" and not (tmp_path / "new").exists()


def test_the_first_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "none" / "file"
    for path, problem in (
        (missing, f"the folder {missing.parent} does not exist"),
        (tmp_path, "is a folder; a file name is needed"),
    ):
        with pytest.raises(ConfigError) as caught:
            refuse_unwritable(tmp_path / "file", path, missing)
        assert str(caught.value) == f"{path}: {problem}"
