"""The process at the other end of an attach connection, as the kernel identifies it."""

from __future__ import annotations

import os
import socket
import struct

from muxmesh.errors import ConfigError


def identify_peer(connection: socket.socket) -> int:
    """The pid of the peer. Raises ConfigError with what would be right if kvstore could not watch or trust it."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if pid == 0:
        raise ConfigError(
            "it is in another pid namespace, so its exit could not be seen; kvstore and the workers of a unit share "
            "one pid namespace: `pid: service:unit` in compose, shareProcessNamespace: true in Kubernetes"
        )
    if uid != os.geteuid():
        raise ConfigError(
            f"it runs as uid {uid}, kvstore as uid {os.geteuid()}; all processes of a unit have to run as one user"
        )
    return int(pid)
