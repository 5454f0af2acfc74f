"""Where compiled kernels are kept, and who compiles them first. Imports no numba, which reads settings at import."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

_log = logging.getLogger(__name__)
_SOURCES = Path(__file__).parent / "cpu"
_PACKING = Path(__file__).parents[2] / "models" / "matrix_packing.py"


def kernel_cache_dir(cache_dir: Path) -> Path:
    """The folder for this version of the kernels.

    numba looks only at the file of the function that is called, not at what that calls: a change in another file would
    leave an old kernel in use.
    """
    digest = hashlib.sha256()
    for path in (*sorted(_SOURCES.glob("*.py")), _PACKING):
        digest.update(path.read_bytes())
    return cache_dir / "numba" / digest.hexdigest()[:12]


@contextlib.contextmanager
def compile_lock(folder: Path) -> Iterator[None]:
    """Two workers that start with an empty cache compile once: the second waits, then reads what the first wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "compile.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not any(folder.rglob("*.nbi")):
            _log.info("compiling the kernels for this machine, once; this takes half a minute")
        yield
