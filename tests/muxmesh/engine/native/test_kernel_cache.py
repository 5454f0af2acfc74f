import fcntl
import logging
import threading
from pathlib import Path

import pytest

from muxmesh.engine.native.kernel_cache import _SOURCES, _digest, compile_lock, kernel_cache_dir


def write_sources(folder: Path, **sources: str) -> list[Path]:
    folder.mkdir()
    for name, text in sources.items():
        (folder / f"{name}.py").write_text(text)
    return sorted(folder.iterdir())


def test_the_folder_is_named_by_the_kernel_sources(tmp_path: Path) -> None:
    folder = kernel_cache_dir(tmp_path)
    assert folder.parent == tmp_path / "numba"
    assert kernel_cache_dir(tmp_path) == folder
    assert not folder.exists()


def test_the_digest_of_equal_sources_does_not_depend_on_their_folder(tmp_path: Path) -> None:
    first, second = (write_sources(tmp_path / name, a="x = 1\n", b="y = 2\n") for name in ("first", "second"))
    assert _digest(first) == _digest(second)


@pytest.mark.parametrize("changed", ["a", "b"])
def test_a_change_of_any_source_changes_the_digest(tmp_path: Path, changed: str) -> None:
    sources = write_sources(tmp_path / "kernels", a="x = 1\n", b="y = 2\n")
    before = _digest(sources)
    (tmp_path / "kernels" / f"{changed}.py").write_text("z = 3\n")
    assert _digest(sources) != before


def test_every_module_of_the_kernels_is_a_source() -> None:
    names = {path.stem for path in _SOURCES.glob("*.py")}
    assert {"attention", "forward", "products", "rows", "thread_team", "vector"} <= names


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


def test_a_second_worker_waits_and_finds_the_kernels_of_the_first(tmp_path: Path) -> None:
    found: list[bool] = []

    def compile_second() -> None:
        with compile_lock(tmp_path):
            found.append((tmp_path / "kernel.nbi").exists())

    second = threading.Thread(target=compile_second)
    with compile_lock(tmp_path):
        second.start()
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
