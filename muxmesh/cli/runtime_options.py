"""The options of commands for a mesh that runs on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name the mesh."""
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--runtime", type=Path, metavar="FILE",
        help="the runtime file of the mesh (default: MUXMESH_RUNTIME, else that of --state-dir)",
    )  # fmt: skip
    place.add_argument(
        "--state-dir", type=Path, metavar="DIR",
        help="the folder that `muxmesh up` uses (default: MUXMESH_STATE_DIR, else ~/.local/state/muxmesh)",
    )  # fmt: skip
