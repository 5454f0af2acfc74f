"""What a worker on a GPU needs installed: torch for CUDA, Triton, and a C compiler with Python's headers.

Looks at files and variables only. Imports none of it, so the supervisor stays without torch, and needs no driver.
"""

from __future__ import annotations

import importlib.util
import runpy
import shutil
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_EXTRAS = "pip install '.[serve,cuda]'"


@dataclass(frozen=True, slots=True)
class GpuSoftware:
    """Folders of torch, of Triton (None: not installed) and of Python's headers."""

    torch: Path | None
    triton: Path | None
    headers: Path

    @classmethod
    def of_this_python(cls) -> GpuSoftware:
        """What this interpreter would import, and where Triton looks for Python.h."""
        scheme = sysconfig.get_default_scheme()
        scheme = "posix_prefix" if scheme == "posix_local" else scheme  # of Debian, which Triton does not use
        headers = Path(sysconfig.get_paths(scheme)["include"])
        return cls(_package_folder("torch"), _package_folder("triton"), headers)


def software_problems(software: GpuSoftware, environ: Mapping[str, str]) -> Iterator[str]:
    """Yields what is missing, each in one line with what installs it. ``environ``: the environment of the workers."""
    missing = [name for name, folder in (("torch", software.torch), ("triton", software.triton)) if folder is None]
    if missing:
        yield f"{' and '.join(missing)} must be installed for this Python: {_EXTRAS}"
    if environ.get("TRITON_INTERPRET") == "1":
        return
    if software.torch is not None and not _has_cuda(software.torch):
        yield f"torch in {software.torch} is a build without CUDA; install one with CUDA (pytorch.org)"
    compiler = environ.get("CC")
    if compiler is not None and shutil.which(compiler, path=environ.get("PATH")) is None:
        yield f"Triton needs a C compiler, and CC is {compiler}, which is no program; set CC to one, or unset it"
    elif compiler is None and not any(shutil.which(name, path=environ.get("PATH")) for name in ("gcc", "clang")):
        yield "Triton needs a C compiler, and neither gcc nor clang is on PATH; install gcc, or set CC"
    elif not (software.headers / "Python.h").is_file() and not {"CPATH", "C_INCLUDE_PATH"} & environ.keys():
        yield f"Triton needs Python's headers, and {software.headers}/Python.h does not exist; install python3-dev"


def _package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _has_cuda(torch: Path) -> bool:
    """Whether a torch is built for CUDA, by the file that it generates for that. True if it has no such file."""
    version = torch / "version.py"
    return not version.is_file() or runpy.run_path(str(version)).get("cuda") is not None
