"""Addresses of HTTP endpoints: HOST:PORT or unix:PATH."""

from __future__ import annotations

from muxmesh.errors import ConfigError
from muxmesh.quoting import quoted
from muxmesh.types import MAX_PORT

UNIX = "unix:"


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of HOST:PORT; an IPv6 address stands in brackets. Raises ConfigError."""
    host, separator, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not separator or not host or (":" in host and not bracketed) or not port.isascii() or not port.isdigit():
        raise ConfigError(f"metrics: {quoted(address)} must be HOST:PORT, like 127.0.0.1:9464, or unix:PATH")
    if int(port[:6]) > MAX_PORT:
        raise ConfigError(f"metrics: the port of {quoted(address)} is larger than {MAX_PORT}")
    return host.strip("[]"), int(port)
