"""Who can reach the addresses of a mesh."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator

from muxmesh.config.schema import MeshConfig
from muxmesh.config.tls_config import TlsConfig


def listen_warnings(config: MeshConfig, published_at: str | None = None) -> Iterator[str]:
    """The warnings about the addresses of a mesh that other machines may reach.

    ``published_at``: the HOST:PORT at which the listen address of a container is published; it decides who reaches it.
    """
    if (warning := public_listen_warning(config.listen, published_at, config.tls)) is not None:
        yield warning
    if config.metrics is not None and _is_public(config.metrics.listen):
        yield (
            f"WARNING: metrics.listen: {config.metrics.listen} can be reached from other machines, without encryption "
            "and without a password: everyone who can connect to it reads the names of models and their load"
        )
    for unit in config.units:
        if unit.network is not None and not unit.network.is_loopback:
            yield (
                f"WARNING: unit {unit.name} can be reached from other machines on the ports {unit.ports[0]} to "
                f"{unit.ports[-1]}, without encryption and without a password: everyone who can connect to them can "
                "use its models and end the requests of others. Let a firewall or a NetworkPolicy admit routers only"
            )


def public_listen_warning(listen: str, published_at: str | None = None, tls: TlsConfig | None = None) -> str | None:
    """The warning about an address that other machines may reach.

    None for one of this machine only, and for one at which clients need a certificate.
    """
    if not _is_public(published_at or listen) or (tls is not None and tls.client_ca is not None):
        return None
    address = f"{listen}, published at {published_at}," if published_at else listen
    if tls is not None:
        return (
            f"WARNING: listen: {address} can be reached from other machines, without a password: everyone who can "
            "connect to it can use the models. Use 127.0.0.1 for this machine only, set tls.client_ca, so that clients "
            "need a certificate, or put a proxy with authentication before it"
        )
    return (
        f"WARNING: listen: {address} can be reached from other machines, without encryption and without a password: "
        "everyone who can connect to it can use the models, and prompts and outputs cross the network unencrypted. Use "
        "127.0.0.1 for this machine only, set `tls` with `client_ca`, or put a proxy with TLS and authentication "
        "before it"
    )


def _is_public(listen: str) -> bool:
    """Whether other machines may reach HOST:PORT. A name is public if any of its addresses is, or if it has none."""
    host = listen.rpartition(":")[0].strip("[]")
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return not all(_is_loopback(str(address[0])) for *_, address in found)
    except (OSError, ValueError):  # ValueError: a name that IDNA cannot encode
        return True


def _is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback
