"""Collects the wheels that a machine with a GPU lacks, for one that has torch and Triton but no package index.

The machine's own packages are constraints for pip's resolver, so what is collected fits them; what they already satisfy
is left out. `install` puts the wheels into a folder for PYTHONPATH, without an index.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MACHINE = Path(__file__).resolve().parent / "gpu_machine.txt"
FOLDER = ROOT / ".whl"
MAX_BYTES = 60_000_000
TEST_PACKAGES = ("pytest-asyncio>=1.0",)
PLATFORM = (
    "--only-binary=:all:",
    "--implementation=cp",
    "--python-version=3.12",
    *(f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28, 31, 34)),
)


def needed_requirements(pyproject: Path) -> list[str]:
    """Requirements of the serving side and of the tests that run on a GPU, with those of the extras that it names."""
    project = tomllib.loads(pyproject.read_text())["project"]
    own_extras = re.compile(rf"{re.escape(project['name'])}\[(.+)\]")

    def of_extra(extra: str) -> Iterator[str]:
        for requirement in project["optional-dependencies"][extra]:
            own = own_extras.fullmatch(requirement)
            if own is None:
                yield requirement
            else:
                for named in own[1].split(","):
                    yield from of_extra(named.strip())

    return [*project["dependencies"], *of_extra("serve"), *TEST_PACKAGES]


def constraints(pip_list: str) -> list[str]:
    """``name==version`` for each package of `pip list` or `pip freeze` output. Raises SystemExit for other text."""
    found = []
    for line in pip_list.splitlines():
        name, _, version = line.strip().replace("==", " ").partition(" ")
        version = version.strip().split(" ")[0]
        if not name or name.startswith(("#", "-")) or (name, version) == ("Package", "Version"):
            continue
        if not version or not version[0].isdigit():
            raise SystemExit(f"{line!r} is not a line of `pip list` or `pip freeze`; NAME VERSION is needed")
        found.append(f"{name}=={version.partition('+')[0]}")
    return found


def normalized(name: str) -> str:
    """A package's name in the one form in which names are compared."""
    return name.lower().replace("_", "-").replace(".", "-")


def missing(report: dict[str, Any], present: list[str]) -> list[str]:
    """``name==version`` of what pip's installation report lists and the machine lacks, in order of name."""
    have = {normalized(one.partition("==")[0]) for one in present}
    found = (item["metadata"] for item in report["install"])
    return sorted(f"{one['name']}=={one['version']}" for one in found if normalized(one["name"]) not in have)


def collect(pip_list: Path, folder: Path) -> int:
    """Downloads what the machine of ``pip_list`` lacks into an emptied ``folder``. Returns the total size in bytes.

    Raises SystemExit if that is more than `MAX_BYTES`, or if pip fails.
    """
    present = constraints(pip_list.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        limits, report = Path(scratch) / "constraints.txt", Path(scratch) / "report.json"
        limits.write_text("\n".join(present) + "\n")
        resolve = ("install", "--dry-run", "--ignore-installed", "--target", scratch, "--report", str(report))
        _pip(*resolve, *PLATFORM, "-c", str(limits), *needed_requirements(ROOT / "pyproject.toml"))
        names = missing(json.loads(report.read_text()), present)
    shutil.rmtree(folder, ignore_errors=True)
    _pip("download", "--no-deps", *PLATFORM, "--dest", str(folder), *names)
    total_bytes = 0
    for wheel in sorted(folder.iterdir()):
        total_bytes += wheel.stat().st_size
        print(f"{wheel.stat().st_size / 1e6:8.2f} MB  {wheel.name}")
    print(f"{total_bytes / 1e6:8.2f} MB  in {folder}")
    if total_bytes > MAX_BYTES:
        raise SystemExit(f"{total_bytes / 1e6:.1f} MB are more than {MAX_BYTES / 1e6:.0f} MB")
    return total_bytes


def install(folder: Path, target: Path) -> None:
    """Installs all wheels of ``folder`` into ``target``, without an index. Raises SystemExit if pip fails."""
    wheels = sorted(str(wheel) for wheel in folder.glob("*.whl"))
    _pip("install", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(target), *wheels)


def _pip(*arguments: str) -> None:
    command = (sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, "--quiet")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"pip {arguments[0]} failed:\n{done.stderr}")


def main() -> None:
    """Collects, or installs what was collected."""
    parser = argparse.ArgumentParser(description="Wheels for a machine with a GPU that has no package index.")
    parser.add_argument("pip_list", type=Path, nargs="?", default=MACHINE, help="output of `pip list` there")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the wheels; collecting empties it")
    parser.add_argument("--install", type=Path, metavar="TARGET", help="install the wheels into TARGET instead")
    arguments = parser.parse_args()
    if arguments.install:
        install(arguments.folder, arguments.install)
    else:
        collect(arguments.pip_list, arguments.folder)


if __name__ == "__main__":
    main()
