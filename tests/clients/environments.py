"""What the foreign clients need, under build/clients: virtual environments, node modules and generated stubs.

Each is set up once, and again when its list of versions or a proto file has changed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PROTOS = ROOT / "protos"
BUILD = ROOT / "build" / "clients"
_PROTO_FILES = ("muxmesh/v1/inference.proto", "muxmesh/v1/mesh.proto")


def python_environment(name: str) -> Path:
    """The interpreter of a virtual environment with the packages of python/NAME.txt."""
    versions = HERE / "python" / f"{name}.txt"

    def set_up(folder: Path) -> None:
        _run(sys.executable, "-m", "venv", folder)
        _run(
            folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", versions
        )

    return _folder(name, [versions], set_up) / "bin" / "python"


def grpclib_stubs(python: Path) -> Path:
    """A folder of messages and stubs for grpclib."""
    plugin = f"--plugin=protoc-gen-grpclib_python={python.parent / 'protoc-gen-grpclib_python'}"
    return _stubs("grpclib-stubs", python, [plugin, "--python_out={}", "--grpclib_python_out={}"])


def betterproto_stubs(python: Path) -> Path:
    """A folder of messages and stubs of betterproto."""
    plugin = f"--plugin=protoc-gen-python_betterproto={python.parent / 'protoc-gen-python_betterproto'}"
    return _stubs("betterproto-stubs", python, [plugin, "--python_betterproto_out={}"])


def node_client() -> Path:
    """A folder with the clients for Node, their modules and the compiled stubs of ts-proto."""
    sources = HERE / "node"

    def set_up(folder: Path) -> None:
        shutil.copytree(sources, folder)
        _run("npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error", cwd=folder)
        stubs = folder / "gen"
        stubs.mkdir()
        plugin = folder / "node_modules" / ".bin" / "protoc-gen-ts_proto"
        options = "outputServices=grpc-js,esModuleInterop=true,env=node,importSuffix=.js,useExactTypes=false"
        _protoc(
            Path(sys.executable),
            [f"--plugin=protoc-gen-ts_proto={plugin}", f"--ts_proto_out={stubs}", f"--ts_proto_opt={options}"],
        )
        _run(folder / "node_modules" / ".bin" / "tsc", "-p", folder, cwd=folder)

    return _folder("node", [*sorted(sources.iterdir()), *_protos()], set_up)


def _stubs(name: str, python: Path, arguments: list[str]) -> Path:
    def set_up(folder: Path) -> None:
        folder.mkdir()
        _protoc(python, [argument.format(folder) for argument in arguments])

    return _folder(name, [HERE / "python" / f"{name.partition('-')[0]}.txt", *_protos()], set_up)


def _protoc(python: Path, arguments: list[str]) -> None:
    """Runs the compiler with the plugins of the environment of ``python``."""
    _run(python, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *arguments, *_PROTO_FILES)


def _protos() -> list[Path]:
    return [PROTOS / name for name in _PROTO_FILES]


def _folder(name: str, inputs: list[Path], set_up: Callable[[Path], None]) -> Path:
    """build/clients/NAME, set up unless it is there and its inputs have not changed."""
    folder, stamp = BUILD / name, BUILD / f"{name}.inputs"
    found = hashlib.sha256(b"".join(path.read_bytes() for path in inputs)).hexdigest()
    if not (folder.is_dir() and stamp.is_file() and stamp.read_text() == found):
        stamp.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        BUILD.mkdir(parents=True, exist_ok=True)
        set_up(folder)
        stamp.write_text(found)
    return folder


def _run(*command: str | Path, cwd: Path = ROOT) -> None:
    """Raises RuntimeError with the output of a command that fails."""
    done = subprocess.run(command, cwd=cwd, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}:\n{done.stdout}")
