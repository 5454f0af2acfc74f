"""Locks on files, between processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from muxmesh.errors import ConfigError
from muxmesh.file_lock import LockHeldError, file_lock, only_process
from tests.support.processes import without_privileges

HOLDER = """
import sys
from pathlib import Path
from muxmesh.file_lock import file_lock
with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_held_by_one_process_and_free_again_when_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(LockHeldError) as refused, file_lock(path):
            pass
        assert refused.value.pid == str(holder.pid)
        holder.kill()
        holder.wait()
        with file_lock(path):
            assert path.read_text() == str(os.getpid())


def test_a_lock_is_free_after_its_block(tmp_path: Path) -> None:
    for _ in range(2):
        with file_lock(tmp_path / "x.lock"):
            pass


def test_a_second_process_of_one_name_on_a_run_folder_is_refused(tmp_path: Path) -> None:
    expected = (
        f"another kvstore/u already runs on {tmp_path} (pid {os.getpid()}); each mesh needs a run folder of its own, "
        "each router on it another --name"
    )
    with (
        only_process(tmp_path, "kvstore/u"),
        only_process(tmp_path, "router-a"),
        pytest.raises(ConfigError, match=re.escape(expected)),
        only_process(tmp_path, "kvstore/u"),
    ):
        pass


def test_the_name_of_a_process_leaves_no_file(tmp_path: Path) -> None:
    with only_process(tmp_path, "router-0f3a"):
        assert [path.name for path in tmp_path.iterdir()] == ["router-0f3a.lock"]
    assert not any(tmp_path.iterdir())


def test_a_lock_on_a_file_that_has_been_deleted_is_not_one(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with file_lock(path):
        path.unlink()
        with file_lock(path), pytest.raises(LockHeldError), file_lock(path):
            pass


def test_a_run_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    expected = re.escape(f"{folder}: no socket can be created there: No such file or directory")
    with pytest.raises(ConfigError, match=expected), only_process(folder, "router"):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_run_folder_of_another_user_is_named_with_both_users(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    os.chown(tmp_path / "run", 10001, 10001)
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from muxmesh.errors import ConfigError\n"
        "from muxmesh.file_lock import only_process\n"
        "try:\n"
        "    only_process(Path(sys.argv[1]), 'router').__enter__()\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    command = without_privileges("-c", script, str(tmp_path / "run"))
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.startswith(f"{tmp_path}/run: permission denied: it is of uid 10001, mode 0700, this process runs as")
