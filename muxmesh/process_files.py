"""Names of the files that belong to one process of a mesh: its socket, its lock and its log."""

from __future__ import annotations


def process_file(process: str, suffix: str) -> str:
    """File name for the display name of a process and a suffix such as ``.sock``: without the slashes of the name."""
    return f"{process.replace('/', '-')}{suffix}"
