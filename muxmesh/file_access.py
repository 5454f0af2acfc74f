"""Why this process may not use a file, folder or socket: whose it is, and what would be right."""

from __future__ import annotations

import os
from pathlib import Path


def why_denied(path: Path) -> str:
    """Describes EACCES for ``path``: its first part that is closed to this process, the part's owner, and this user."""
    closed = _first_closed(path)
    try:
        status = os.stat(closed)
    except OSError:
        return f"{path}: permission denied for uid {os.geteuid()}"
    found = f"{closed}: permission denied: it is of uid {status.st_uid}, mode {status.st_mode & 0o7777:04o}"
    if status.st_uid == os.geteuid():
        return f"{found}, as this process; its mode has to allow it"
    return (
        f"{found}, this process runs as uid {os.geteuid()}; "
        "all processes of a mesh on one run folder have to run as one user"
    )


def _first_closed(path: Path) -> Path:
    """The first folder above ``path`` that cannot be searched; else the path, or its folder if it does not exist."""
    for folder in reversed(path.absolute().parents):
        if not os.access(folder, os.X_OK, effective_ids=True):
            return folder
    return path if path.exists() else path.parent
