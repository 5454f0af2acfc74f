"""What a worker on a GPU needs installed: a table of installations with one thing missing."""

import os
from pathlib import Path

import pytest

from muxmesh.models.gpu_software import GpuSoftware, software_problems


@pytest.fixture
def software(tmp_path: Path) -> GpuSoftware:
    """A complete installation: torch for CUDA, Triton, Python.h, and gcc in the folder `bin`."""
    for name in ("torch", "triton", "include", "bin"):
        (tmp_path / name).mkdir()
    (tmp_path / "torch" / "version.py").write_text("cuda: str | None = '13.0'\n")
    (tmp_path / "include" / "Python.h").touch()
    (tmp_path / "bin" / "gcc").touch(0o755)
    return GpuSoftware(tmp_path / "torch", tmp_path / "triton", tmp_path / "include")


def problem(software: GpuSoftware, tmp_path: Path, **variables: str) -> str:
    """The only problem; empty if there is none."""
    found = list(software_problems(software, {"PATH": str(tmp_path / "bin"), **variables}))
    assert len(found) <= 1 and not any("\n" in one for one in found)
    return "".join(found)


def test_a_complete_installation_has_no_problem(software: GpuSoftware, tmp_path: Path) -> None:
    assert problem(software, tmp_path) == ""
    assert problem(software, tmp_path, CC=str(tmp_path / "bin" / "gcc"), PATH="/nowhere") == ""


def test_packages_that_are_not_installed_are_named_with_the_command_that_installs_them(
    software: GpuSoftware, tmp_path: Path
) -> None:
    nothing = GpuSoftware(None, None, software.headers)
    assert problem(nothing, tmp_path) == (
        "torch and triton must be installed for this Python: pip install '.[serve,cuda]'"
    )
    assert "triton must" in problem(GpuSoftware(software.torch, None, software.headers), tmp_path)
    assert "torch must" in problem(GpuSoftware(None, software.triton, software.headers), tmp_path, TRITON_INTERPRET="1")


def test_a_torch_without_cuda_is_refused_unless_kernels_are_interpreted(software: GpuSoftware, tmp_path: Path) -> None:
    (tmp_path / "torch" / "version.py").write_text("from typing import Optional\ncuda: Optional[str] = None\n")
    assert problem(software, tmp_path).startswith(f"torch in {tmp_path / 'torch'} is a build without CUDA; install")
    assert problem(software, tmp_path, TRITON_INTERPRET="1") == ""


def test_a_torch_of_unknown_build_is_left_to_the_worker(software: GpuSoftware, tmp_path: Path) -> None:
    (tmp_path / "torch" / "version.py").unlink()
    assert problem(software, tmp_path) == ""


def test_the_compiler_that_triton_would_call_must_exist(software: GpuSoftware, tmp_path: Path) -> None:
    assert problem(software, tmp_path, CC="/nowhere/cc") == (
        "Triton needs a C compiler, and CC is /nowhere/cc, which is no program; set CC to one, or unset it"
    )
    (tmp_path / "bin" / "gcc").rename(tmp_path / "bin" / "clang")
    assert problem(software, tmp_path) == ""
    (tmp_path / "bin" / "clang").unlink()
    assert problem(software, tmp_path) == (
        "Triton needs a C compiler, and neither gcc nor clang is on PATH; install gcc, or set CC"
    )
    assert problem(software, tmp_path, TRITON_INTERPRET="1") == ""


def test_the_headers_of_python_must_exist(software: GpuSoftware, tmp_path: Path) -> None:
    (tmp_path / "include" / "Python.h").unlink()
    assert problem(software, tmp_path) == (
        f"Triton needs Python's headers, and {tmp_path}/include/Python.h does not exist; install python3-dev"
    )
    assert problem(software, tmp_path, CPATH="/opt/include") == ""


def test_what_is_found_for_this_python_is_where_it_imports_from(tmp_path: Path) -> None:
    found = GpuSoftware.of_this_python()
    assert found.torch is not None and (found.torch / "nn").is_dir()
    assert list(software_problems(found, {**os.environ, "TRITON_INTERPRET": "1"})) == []
