"""How a command finds a mesh that runs on this machine: by its runtime file, which names its sockets and its Redis."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from muxmesh.cli.common import state_dir_of
from muxmesh.config.runtime import RUNTIME_FILE, MeshRuntime
from muxmesh.errors import Unavailable
from muxmesh.supervisor.run_folder import run_folders


def find_runtime(arguments: argparse.Namespace) -> MeshRuntime:
    """The runtime file that the arguments name (`runtime_options`).

    Raises Unavailable if no mesh runs with the state directory, ConfigError if the file cannot be read.
    """
    return MeshRuntime.read(_runtime_file(arguments))


def _runtime_file(arguments: argparse.Namespace) -> Path:
    if arguments.runtime is not None:
        return Path(arguments.runtime)
    if arguments.state_dir is None and (named := os.environ.get("MUXMESH_RUNTIME")):
        return Path(named)
    state_dir = state_dir_of(arguments.state_dir)
    files = [file for folder in run_folders(state_dir) if (file := folder / RUNTIME_FILE).is_file()]
    if not files:
        raise Unavailable(
            f"no mesh runs with the state directory {state_dir}; name another with --state-dir, or the runtime file of "
            "a mesh without `muxmesh up` with --runtime"
        )
    return max(files, key=lambda file: file.stat().st_mtime)
