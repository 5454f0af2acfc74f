"""Why a process of another user may not use a file."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from pathlib import Path
from muxmesh.file_access import why_denied
os.setuid(65534)
print(why_denied(Path(sys.argv[1])))
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def folder() -> Iterator[Path]:
    """The folders of pytest are closed to other users."""
    path = Path("/tmp") / f"muxmesh-access-{os.getpid()}"
    path.mkdir(mode=0o755)
    yield path
    for entry in sorted(path.rglob("*"), reverse=True):
        entry.rmdir() if entry.is_dir() else entry.unlink()
    path.rmdir()


def why(path: Path) -> str:
    """The reason that a process of the user `nobody` is given."""
    return subprocess.run([sys.executable, "-c", SCRIPT, path], capture_output=True, text=True, check=True).stdout


ONE_USER = "this process runs as uid 65534; all processes of a mesh on one run folder have to run as one user\n"


def test_the_first_folder_that_is_closed_is_named_with_its_owner(folder: Path) -> None:
    (folder / "run").mkdir(mode=0o700)
    (folder / "run" / "in").mkdir()
    os.chown(folder / "run", 10001, 10001)
    expected = f"{folder}/run: permission denied: it is of uid 10001, mode 0700, {ONE_USER}"
    assert why(folder / "run" / "in" / "file") == expected


def test_a_file_that_is_closed_is_named_with_its_owner(folder: Path) -> None:
    (folder / "file").touch(mode=0o600)
    assert why(folder / "file") == f"{folder}/file: permission denied: it is of uid 0, mode 0600, {ONE_USER}"


def test_for_a_file_that_cannot_be_created_its_folder_is_named(folder: Path) -> None:
    assert why(folder / "new") == f"{folder}: permission denied: it is of uid 0, mode 0755, {ONE_USER}"


def test_an_own_folder_lacks_a_mode(folder: Path) -> None:
    (folder / "own").mkdir(mode=0o600)
    os.chown(folder / "own", 65534, 65534)
    assert why(folder / "own" / "file") == (
        f"{folder}/own: permission denied: it is of uid 65534, mode 0600, as this process; its mode has to allow it\n"
    )
