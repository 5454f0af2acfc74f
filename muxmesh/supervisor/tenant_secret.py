"""The random secret of a state folder, with which routers hash the names of tenants (`router.tenant_key`).

It outlives the supervisor, so that a predictor's snapshot in an external Redis stays usable.
"""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

from muxmesh.errors import ConfigError
from muxmesh.file_replacement import replace_file

_log = logging.getLogger(__name__)

SECRET_FILE = "tenant-secret"  # noqa: S105 - a file name
SECRET_VARIABLE = "MUXMESH_TENANT_SECRET"  # noqa: S105 - its name
_SECRET_BYTES = 32


def given_tenant_secret(value: str | None) -> str | None:
    """The secret in the variable `SECRET_VARIABLE`, the same for routers on several hosts; None if it is not set.

    Raises ConfigError for anything but 32 bytes in hexadecimal.
    """
    if not value:
        return None
    try:
        if len(bytes.fromhex(value)) == _SECRET_BYTES:
            return value
    except ValueError:
        pass
    raise ConfigError(f"{SECRET_VARIABLE}: must be {_SECRET_BYTES} bytes in hexadecimal (`openssl rand -hex 32`)")


def tenant_secret(state_dir: Path) -> str:
    """Reads the secret of ``state_dir``, as hexadecimal text. Writes a new one if there is none, or a damaged one.

    A secret that cannot be written lasts as long as this supervisor.
    """
    path = state_dir / SECRET_FILE
    try:
        found = path.read_text()
        if len(bytes.fromhex(found)) == _SECRET_BYTES:
            return found
    except (OSError, ValueError):
        pass
    secret = secrets.token_hex(_SECRET_BYTES)
    try:
        replace_file(path, secret)
    except OSError as error:
        _log.warning("%s: the secret for tenants cannot be kept: %s", path, error)
    return secret
