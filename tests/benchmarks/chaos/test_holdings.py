"""What a mesh holds of a GPU: descriptors and mappings of its memory, and the files of the MPS daemon."""

import mmap
import os
from pathlib import Path

import pytest

from benchmarks.chaos.checker import leaks
from benchmarks.chaos.history import Holdings
from benchmarks.chaos.holdings import read_holdings
from benchmarks.chaos.processes import MeshProcesses
from muxmesh.config.runtime import MeshRuntime
from muxmesh.config.schema import MeshConfig
from muxmesh.v1 import mesh_pb2


@pytest.fixture
def processes(tmp_path: Path) -> MeshProcesses:
    """This process is the only one of the mesh."""
    runtime = MeshRuntime(
        config=MeshConfig.model_validate({"units": [{"models": [{"name": "m"}]}]}),
        run_dir=tmp_path,
        cache_dir=tmp_path,
        redis_url="",
        prepared={},
    )
    return MeshProcesses(os.getpid(), runtime)


def held(processes: MeshProcesses) -> Holdings:
    return read_holdings(mesh_pb2.GetStatusResponse(), processes, processes.runtime.run_dir)


def leaked_names(before: Holdings, after: Holdings) -> set[str]:
    """Leaks of what is counted by name; no mesh answers here, so the counters of its status are not looked at."""
    return {one.text for one in leaks(before, after) if "more than before" in one.text}


def test_device_memory_that_stays_open_or_mapped_is_leaked(processes: MeshProcesses) -> None:
    before = held(processes)
    fd = os.memfd_create("fake-cuda-memory-0")
    try:
        os.truncate(fd, mmap.PAGESIZE)
        assert leaked_names(before, held(processes)) == {"device memory of supervisor: fd: 1 more than before"}
        with mmap.mmap(fd, mmap.PAGESIZE):
            assert "device memory of supervisor: mapping: 1 more than before" in leaked_names(before, held(processes))
    finally:
        os.close(fd)
    assert not leaked_names(before, held(processes))


def test_a_file_that_stays_in_a_pipe_directory_is_leaked(processes: MeshProcesses) -> None:
    before = held(processes)
    pipe_dir = processes.runtime.run_dir / "mps-fa4ecada"
    pipe_dir.mkdir()
    (pipe_dir / "control_lock").touch()
    assert leaked_names(before, held(processes)) == {"file mps-fa4ecada/control_lock: 1 more than before"}
