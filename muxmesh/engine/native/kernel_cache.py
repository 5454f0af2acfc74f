"""The folder of compiled kernels, and a lock so that one process compiles at a time.

Does not import numba, because numba reads its settings from the environment when it is imported.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

_log = logging.getLogger(__name__)
_SOURCES = Path(__file__).parent / "cpu"
_PACKING = Path(__file__).parents[2] / "models" / "matrix_packing.py"


def kernel_cache_dir(cache_dir: Path) -> Path:
    """Returns the folder for the present kernel sources: a digest of all of them is its name.

    numba invalidates a cached kernel only when the file of that kernel changes, not when a file changes whose functions
    the kernel calls. Without the digest, numba would load an outdated kernel.
    """
    return cache_dir / "numba" / _digest([*sorted(_SOURCES.glob("*.py")), _PACKING])


def _digest(sources: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def compile_lock(folder: Path) -> Iterator[None]:
    """Holds an exclusive lock on ``folder``, which it creates. Blocks while another process holds the lock.

    Of two workers that start with an empty cache, the second waits and then loads the kernels of the first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "compile.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not any(folder.rglob("*.nbi")):
            _log.info("compiling the kernels for this machine; this happens once and takes half a minute")
        yield
