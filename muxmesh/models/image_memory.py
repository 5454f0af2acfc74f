"""Frees the memory that a weight image takes in the page cache. Knows nothing of what an image holds."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from pathlib import Path


def release_image(image: Path) -> None:
    """Frees the memory of an image that this process does not map any more, and what the heap has kept for itself.

    The kernel keeps the pages that another process maps. Does nothing more if the file is gone.
    """
    gc.collect()
    with contextlib.suppress(OSError):
        fd = os.open(image, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    with contextlib.suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)
