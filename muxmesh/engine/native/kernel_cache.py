"""The folder of compiled kernels, a lock so that one process compiles at a time, and the process that compiles.

Does not import numba, because numba reads its settings from the environment when it is imported.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from muxmesh.errors import ConfigError

_log = logging.getLogger(__name__)
_SOURCES = Path(__file__).parent / "cpu"
_PACKING = Path(__file__).parents[2] / "models" / "matrix_packing.py"


def kernel_cache_dir(cache_dir: Path) -> Path:
    """Returns the folder for the present kernel sources: a digest of all of them is its name.

    numba invalidates a cached kernel only when the file of that kernel changes, not when a file changes whose functions
    the kernel calls. Without the digest, numba would load an outdated kernel.
    """
    return cache_dir / "numba" / _digest(_sources())


def _sources() -> list[Path]:
    return [*sorted(_SOURCES.glob("*.py")), _PACKING]


def _digest(sources: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def compile_lock(folder: Path) -> Iterator[None]:
    """Holds an exclusive lock on ``folder``, which it creates. Blocks while another process holds the lock.

    Of two workers that start with an empty cache, the second waits and then loads the kernels of the first. Raises
    ConfigError for an OSError of the block: the disk is full, for example.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "compile.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not any(folder.rglob("*.nbi")):
                _log.info("compiling the kernels for this machine; this happens once and takes half a minute")
            yield
    except OSError as error:
        raise ConfigError(f"{folder}: the compiled kernels cannot be written or read: {error}") from error


def compile_elsewhere(folder: Path, module: str, arguments: Sequence[str]) -> None:
    """Runs ``python -m module arguments`` if it has not filled ``folder`` for this installation yet; waits for it.

    If it fails, the caller's process will compile the kernels itself.
    """
    done = folder / f"compiled-{_installation()}"
    if done.exists():
        return
    code = subprocess.run((sys.executable, "-m", module, *arguments), check=False).returncode
    if code == 0:
        done.touch()
    else:
        _log.warning("the compilation of the kernels in a process of its own ended with exit code %d", code)


def _installation() -> str:
    """A digest of what numba's cache depends on beside the sources: their paths and times, versions, and the CPU."""
    files = [f"{path} {path.stat().st_mtime_ns}" for path in _sources()]
    versions = [f"{name} {version(name)}" for name in ("numba", "llvmlite", "numpy")]
    text = "\n".join([*files, *versions, platform.python_version(), _cpu_features()])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _cpu_features() -> str:
    """The line of instruction sets in /proc/cpuinfo, or what Python knows of the machine."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.machine()
