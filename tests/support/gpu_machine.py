"""A machine with a fake GPU: driver and MPS control program are fakes, kernels are interpreted over its memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from tests.support.fake_driver import fake_driver_folder
from tests.support.mps import FAKE_FOLDER


@contextmanager
def gpu_machine(**settings: str) -> Iterator[None]:
    """While the block runs, processes that this one starts find the fake GPU. ``settings``: see the fakes' heads."""
    variables = {
        "PATH": f"{FAKE_FOLDER}{os.pathsep}{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(fake_driver_folder()),
        "FAKE_CUDA_HOST_ACCESS": "1",
        "TRITON_INTERPRET": "1",
        **settings,
    }
    with mock.patch.dict(os.environ, variables):
        yield


def maps(pid: int, what: str) -> list[str]:
    """The mappings of a process whose name contains ``what``."""
    return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if what in line]
