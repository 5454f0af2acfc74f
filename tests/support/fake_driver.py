"""Builds the fake CUDA driver of `tests/support/fake_cuda`, and what its processes leave behind."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SOURCES = Path(__file__).with_name("fake_cuda")
_CACHE = Path(__file__).resolve().parents[2] / "build" / "test-cache"
FLAGS = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1")

UUID = "GPU-fa4ecada-0000-4000-8000-000000000000"
"""The only device unless FAKE_CUDA_UUIDS says otherwise."""
OTHER_UUID = "GPU-fa4ecada-0000-4000-8000-000000000001"
NUM_SMS = 132


def fake_driver_folder() -> Path:
    """The folder of the fake `libcuda.so.1`, compiled when needed. Without a compiler the test is skipped."""
    files = sorted(SOURCES.glob("*.[ch]"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files) + " ".join(FLAGS).encode()).hexdigest()
    folder = _CACHE / f"fake-cuda-{digest[:16]}"
    if not (folder / "libcuda.so.1").exists():
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("there is no C compiler (cc) to build the fake CUDA driver with")
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{os.getpid()}.so"
        sources = [str(file) for file in files if file.suffix == ".c"]
        subprocess.run([compiler, *FLAGS, *sources, "-o", str(unfinished), "-lpthread", "-ldl"], check=True)
        unfinished.rename(folder / "libcuda.so.1")
    return folder


def fake_driver_library() -> str:
    """The path of the fake driver, for a `CudaDriver` of this process."""
    return str(fake_driver_folder() / "libcuda.so.1")


def fake_driver_environment(**settings: str) -> dict[str, str]:
    """This process's environment with the fake driver as `libcuda.so.1`. ``settings``: see the fake's README."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "FAKE_CUDA_"))}
    return {**inherited, "LD_LIBRARY_PATH": str(fake_driver_folder()), **settings}


def device_resources(pid: int | None = None) -> Counter[str]:
    """File descriptors and mappings of device memory of a process, by name. Two equal counters: nothing leaked."""
    process = Path("/proc") / ("self" if pid is None else str(pid))
    found: Counter[str] = Counter()
    for fd in (process / "fd").iterdir():
        try:
            target = os.readlink(fd)
        except FileNotFoundError:  # the descriptor of this directory
            continue
        found[f"fd {target}"] += "memfd:fake-cuda" in target
    for line in (process / "maps").read_text().splitlines():
        if "memfd:fake-cuda" in line:
            found[f"mapping {line.split(maxsplit=5)[5]}"] += 1
    return +found


def output_on_fake(script: str, *arguments: str, **settings: str) -> tuple[str, str]:
    """Runs a Python script on the fake driver. Returns its output and its errors; raises if it fails."""
    command = (sys.executable, "-c", script, *arguments)
    environment = fake_driver_environment(**settings)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr
