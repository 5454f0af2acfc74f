"""Temporary folders of sockets. Those under the state directory: `test_mesh_supervisor`."""

import os
import tempfile
from pathlib import Path

import pytest

from muxmesh.supervisor.run_folder import (
    RUN_MARK,
    TEMPORARY_FOLDER_FILE,
    delete_earlier_run_folders,
    delete_run_folder,
    temporary_run_folder,
)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir()
    return folder


def test_the_temporary_folder_of_a_supervisor_that_was_killed_is_deleted_by_the_next_one(
    state_dir: Path, temporary: Path
) -> None:
    (temporary_run_folder(state_dir) / "router.sock").touch()
    delete_earlier_run_folders(state_dir)
    assert list(temporary.iterdir()) == list(state_dir.iterdir()) == []


def test_a_supervisor_deletes_its_temporary_folder_and_the_note_of_it(state_dir: Path, temporary: Path) -> None:
    delete_run_folder(temporary_run_folder(state_dir), state_dir)
    assert list(temporary.iterdir()) == list(state_dir.iterdir()) == []


def test_a_temporary_folder_that_cannot_be_noted_is_not_left(state_dir: Path, temporary: Path) -> None:
    state_dir.rmdir()
    with pytest.raises(FileNotFoundError):
        temporary_run_folder(state_dir)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("kind", ["not marked", "a link", "absent", "not a path", "not text"])
def test_a_noted_folder_that_no_supervisor_made_is_kept(state_dir: Path, temporary: Path, kind: str) -> None:
    folder, note = temporary / "folder", state_dir / TEMPORARY_FOLDER_FILE
    folder.mkdir()
    (folder / ("file" if kind == "not marked" else RUN_MARK)).touch()
    (temporary / "link").symlink_to(folder)
    named = {"a link": temporary / "link", "absent": temporary / "absent", "not a path": "\0"}.get(kind, folder)
    note.write_bytes(b"\xff" if kind == "not text" else str(named).encode())
    delete_earlier_run_folders(state_dir)
    assert len(list(folder.iterdir())) == 1
    assert not note.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_noted_folder_of_another_user_is_kept(state_dir: Path, temporary: Path) -> None:
    folder = temporary_run_folder(state_dir)
    os.chown(folder, 12345, 12345)
    delete_earlier_run_folders(state_dir)
    assert (folder / RUN_MARK).exists()
