"""Files that only their owner can read, replaced as a whole."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def replace_private_file(path: Path, text: str) -> None:
    """Replaces a file by one of mode 0600, as a whole or not at all. Raises OSError."""
    descriptor, name = tempfile.mkstemp(prefix=f"{path.name}-", dir=path.parent)
    try:
        with open(descriptor, "w") as file:
            file.write(text)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise
