"""The folder of the sockets of one supervisor: where it is, and how that of a supervisor that was killed is found.

    STATE_DIR/run-PID                  the folder, if the paths of its sockets are short enough
    STATE_DIR/temporary-run-folder     else: a file with the path of a temporary folder

A folder is never used again, because processes of a supervisor that was killed may still remove sockets in theirs. The
caller holds the lock on the state directory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from itertools import count
from pathlib import Path

RUN_MARK = "muxmesh-run"
"""Name of an empty file in each folder of sockets. A folder without it was not made by a supervisor."""
TEMPORARY_FOLDER_FILE = "temporary-run-folder"


def free_run_folder(state_dir: Path) -> Path:
    """A path under ``state_dir`` at which nothing is. Creates nothing."""
    name = f"run-{os.getpid()}"
    paths = (state_dir / (name if number == 1 else f"{name}-{number}") for number in count(1))
    return next(path for path in paths if not os.path.lexists(path))


def temporary_run_folder(state_dir: Path) -> Path:
    """Creates a folder with a short path, and notes it in ``state_dir``. Raises OSError."""
    folder = Path(tempfile.mkdtemp(prefix="muxmesh-"))
    try:
        create_run_folder(folder)
        (state_dir / TEMPORARY_FOLDER_FILE).write_text(str(folder))
    except OSError:
        delete_run_folder(folder, state_dir)
        raise
    return folder


def create_run_folder(folder: Path) -> None:
    """Creates the folder with its mark, unless it exists, and makes it private. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    (folder / RUN_MARK).touch()


def delete_run_folder(folder: Path, state_dir: Path) -> None:
    """Deletes a folder of this supervisor, and the note of it. What cannot be deleted is left."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        (state_dir / TEMPORARY_FOLDER_FILE).unlink()


def run_folders(state_dir: Path) -> list[Path]:
    """Where folders of supervisors with ``state_dir`` may be, earlier ones included. What is there is not checked."""
    folders = list(state_dir.glob("run-*"))
    with contextlib.suppress(OSError, ValueError):  # there is no note, or its content is not text
        folders.append(Path((state_dir / TEMPORARY_FOLDER_FILE).read_text()))
    return folders


def delete_earlier_run_folders(state_dir: Path) -> None:
    """Deletes the folders of earlier supervisors: of this user, marked, and no links."""
    for folder in filter(_is_run_folder, run_folders(state_dir)):
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        (state_dir / TEMPORARY_FOLDER_FILE).unlink()


def _is_run_folder(path: Path) -> bool:
    try:
        status = os.lstat(path)
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and os.path.lexists(path / RUN_MARK)
    except (OSError, ValueError):  # ValueError: a zero in the path
        return False
