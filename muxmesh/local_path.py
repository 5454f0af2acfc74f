"""Paths on this machine as a person gives them, on the command line or in mesh.yaml."""

from __future__ import annotations

import os
from pathlib import Path


def local_path(given: str, base_dir: Path) -> Path:
    """The path that a person gave, from ``base_dir`` if it is relative. Unlike `Path.resolve` it accepts any text."""
    return Path(os.path.realpath(_joined(given, base_dir)))


def replaceable_path(given: str, base_dir: Path) -> Path:
    """Like `local_path`, with symbolic links as they are: for a file that may be replaced by changing a link."""
    return Path(os.path.abspath(_joined(given, base_dir)))


def _joined(given: str, base_dir: Path) -> Path:
    return base_dir / os.path.expanduser(given.replace("\0", "\ufffd"))
