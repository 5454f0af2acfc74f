"""Whether a process can listen on a TCP address, in words: gRPC does not say why it cannot."""

from __future__ import annotations

import socket
from errno import EADDRINUSE

from muxmesh.errors import ConfigError
from muxmesh.types import MAX_PORT


def bindable_port(address: str) -> int:
    """The port of HOST:PORT, or a free one for port 0. Raises ConfigError if the address is invalid or in use."""
    host, _, port = address.rpartition(":")
    try:
        if int(port) > MAX_PORT:
            raise ValueError(f"port is larger than {MAX_PORT}")
        family, kind, protocol, _, found = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found)
            return int(probe.getsockname()[1])
    except (OSError, OverflowError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else error
        hint = "; choose another port, or 0 for a free one" if getattr(error, "errno", None) == EADDRINUSE else ""
        raise ConfigError(f"cannot listen on {address}: {problem}{hint}") from error
