"""Generates the Python code of protos/ into muxmesh/. With `--check` it only compares; exit code 1 on a difference.

File path, proto package and Python package are the same, so nothing is rewritten after generation.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
PACKAGES = ("muxmesh/v1", "muxmesh/internal/v1")
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def generate(out: Path) -> None:
    """Runs protoc with the Python, gRPC and mypy generators. Raises CalledProcessError for an invalid proto."""
    files = [str(path.relative_to(PROTOS)) for path in sorted(PROTOS.rglob("*.proto"))]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}"]
    command += [f"--plugin=protoc-gen-mypy={Path(sys.executable).parent / 'protoc-gen-mypy'}"]
    command += [f"--plugin=protoc-gen-mypy_grpc={Path(sys.executable).parent / 'protoc-gen-mypy_grpc'}"]
    command += [f"--{name}_out={out}" for name in ("python", "grpc_python", "mypy", "mypy_grpc")]
    subprocess.run([*command, *files], check=True)
    for package in PACKAGES:
        (out / package / "__init__.py").write_text('"""Generated from protos/ by `make protos`. Do not edit."""\n')


def generated_files(base: Path) -> dict[str, str]:
    """Relative path → text of each generated file under ``base``."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        for path in sorted((base / package).glob("*.py*")):
            if path.name.endswith(SUFFIXES) or path.name == "__init__.py":
                found[str(path.relative_to(base))] = path.read_text()
    return found


def main() -> int:
    """Generates, or checks that the committed files are up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        for package in PACKAGES:
            (ROOT / package).mkdir(parents=True, exist_ok=True)
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh, committed = generated_files(Path(scratch)), generated_files(ROOT)
    stale = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
    for name in stale:
        print(f"{name}: differs from what protos/ generates; run `make protos`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
