import errno
import fcntl
import logging
import os
import re
import shutil
import threading
import time
from pathlib import Path

import pytest

from muxmesh.engine.native import kernel_cache
from muxmesh.engine.native.kernel_cache import compile_elsewhere, compile_lock, kernel_cache_dir
from muxmesh.errors import ConfigError


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with kernel sources of this test: ``cpu/a.py``, ``cpu/b.py`` and ``packing.py``."""
    (tmp_path / "cpu").mkdir()
    for name in ("cpu/a.py", "cpu/b.py", "packing.py"):
        (tmp_path / name).write_text(f"name = {name!r}\n")
    monkeypatch.setattr(kernel_cache, "_SOURCES", tmp_path / "cpu")
    monkeypatch.setattr(kernel_cache, "_PACKING", tmp_path / "packing.py")
    return tmp_path


def test_the_folder_is_inside_the_cache_and_is_not_created(tmp_path: Path) -> None:
    folder = kernel_cache_dir(tmp_path)
    assert folder.parent == tmp_path / "numba"
    assert not folder.exists()


@pytest.mark.parametrize("changed", ["cpu/a.py", "cpu/b.py", "cpu/c.py", "packing.py"])
def test_a_changed_or_added_source_has_another_folder(sources: Path, changed: str) -> None:
    before = kernel_cache_dir(sources)
    assert kernel_cache_dir(sources) == before
    (sources / changed).write_text("name = 'changed'\n")
    assert kernel_cache_dir(sources) != before


def test_equal_sources_elsewhere_have_the_same_folder(
    sources: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kernel_cache_dir(sources)
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(sources, copy, dirs_exist_ok=True)
    monkeypatch.setattr(kernel_cache, "_SOURCES", copy / "cpu")
    monkeypatch.setattr(kernel_cache, "_PACKING", copy / "packing.py")
    assert kernel_cache_dir(sources) == before


def test_every_module_of_the_kernels_is_a_source() -> None:
    names = {path.stem for path in kernel_cache._SOURCES.glob("*.py")}
    assert {"attention", "forward", "products", "rows", "thread_team", "vector"} <= names
    assert kernel_cache._PACKING.name == "matrix_packing.py" and kernel_cache._PACKING.exists()


def is_locked(folder: Path) -> bool:
    with (folder / "compile.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_the_lock_is_held_inside_the_block_only(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "kernels"
    with compile_lock(folder):
        assert is_locked(folder)
    assert not is_locked(folder)


def test_the_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), compile_lock(tmp_path):
        raise ZeroDivisionError
    assert not is_locked(tmp_path)


def wait_for_waiter(folder: Path) -> None:
    """Waits until a lock attempt on ``folder`` is blocked, which the kernel lists with an arrow."""
    inode = (folder / "compile.lock").stat().st_ino
    for _ in range(3000):
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        if any(lock[1] == "->" and lock[6].endswith(f":{inode}") for lock in locks):
            return
        time.sleep(0.01)
    raise TimeoutError("nothing waits for the lock")


def test_a_second_worker_waits_and_finds_the_kernels_of_the_first(tmp_path: Path) -> None:
    found: list[bool] = []

    def compile_second() -> None:
        with compile_lock(tmp_path):
            found.append((tmp_path / "kernel.nbi").exists())

    second = threading.Thread(target=compile_second)
    with compile_lock(tmp_path):
        second.start()
        wait_for_waiter(tmp_path)
        assert found == []
        (tmp_path / "kernel.nbi").touch()
    second.join(timeout=60)
    assert found == [True]


def test_only_a_worker_without_compiled_kernels_announces_the_compilation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with compile_lock(tmp_path):
        assert "compiling the kernels for this machine" in caplog.text
        (tmp_path / "deeper").mkdir()
        (tmp_path / "deeper" / "kernel.nbi").touch()
    caplog.clear()
    with compile_lock(tmp_path):
        assert caplog.text == ""


def run_in_a_process(folder: Path, statement: str) -> None:
    compile_elsewhere(folder, "timeit", ["-n", "1", "-r", "1", statement])


def test_the_process_that_compiles_runs_once_for_an_installation(sources: Path) -> None:
    log = sources / "log"
    for _ in range(3):
        run_in_a_process(sources, f"open({str(log)!r}, 'a').write('x')")
    assert log.read_text() == "x"


def test_the_process_that_compiles_runs_again_for_sources_of_another_time(sources: Path) -> None:
    """numba does not load what it compiled from a file of another time, even if the content is the same."""
    log = sources / "log"
    for seconds in (1, 2):
        os.utime(sources / "cpu" / "a.py", (seconds, seconds))
        run_in_a_process(sources, f"open({str(log)!r}, 'a').write('x')")
    assert log.read_text() == "xx"


def test_a_failed_compilation_is_reported_and_tried_again(sources: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_in_a_process(sources, "1 / 0")
    assert "ended with exit code 1" in caplog.text
    run_in_a_process(sources, f"open({str(sources / 'log')!r}, 'a').write('x')")
    assert (sources / "log").exists()


def test_a_disk_that_is_full_is_one_line_that_names_the_folder(tmp_path: Path) -> None:
    problem = f"{tmp_path}: the compiled kernels cannot be written or read: [Errno 28] No space left on device"
    with pytest.raises(ConfigError, match=re.escape(problem)), compile_lock(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "kernels"
    with pytest.raises(ConfigError, match=f"^{re.escape(str(folder))}: .* Not a directory"), compile_lock(folder):
        pass
