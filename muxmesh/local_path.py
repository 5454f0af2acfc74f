"""Paths on this machine as a person gives them, on the command line or in mesh.yaml."""

from __future__ import annotations

import os
from pathlib import Path


def local_path(given: str, base_dir: Path) -> Path:
    """The path that a person gave, from ``base_dir`` if it is relative. Unlike `Path.resolve` it accepts any text."""
    return Path(os.path.realpath(base_dir / os.path.expanduser(given.replace("\0", "\ufffd"))))
