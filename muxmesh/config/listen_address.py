"""Who can reach the addresses of a mesh."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator

from muxmesh.config.schema import MeshConfig
from muxmesh.errors import ConfigError


def check_open_access(config: MeshConfig, published_at: str | None = None) -> None:
    """Raises ConfigError if other machines may use the mesh without an API key, and the file does not say so twice.

    ``published_at``: see `listen_warnings`.
    """
    if _needs_keys(config) or _needs_certificates(config) or config.access.open_on_network:
        return
    if _is_public(published_at or config.listen):
        raise ConfigError(
            f"listen: other machines may connect to {published_at or config.listen}, and every caller may use the "
            "models, as access.mode is open. Set access: {mode: keys} and give out API keys (`muxmesh tenant add`), "
            "tls.client_ca so that clients need a certificate, or access: {open_on_network: true} if a firewall or a "
            "proxy decides who may connect; 127.0.0.1 is for this machine only"
        )


def listen_warnings(config: MeshConfig, published_at: str | None = None) -> Iterator[str]:
    """The warnings about the addresses of a mesh that other machines may reach.

    ``published_at``: the HOST:PORT at which the listen address of a container is published; it decides who reaches it.
    """
    if (warning := public_listen_warning(config, published_at)) is not None:
        yield warning
    if config.metrics is not None and _is_public(config.metrics.listen):
        yield (
            f"WARNING: metrics.listen: {config.metrics.listen} can be reached from other machines, without encryption "
            "and without a password: everyone who can connect to it reads the names of models and their load"
        )
    for unit in config.units:
        if unit.network is not None and not unit.network.is_loopback and config.internal_tls is None:
            yield (
                f"WARNING: unit {unit.name} can be reached from other machines on the ports {unit.ports[0]} to "
                f"{unit.ports[-1]}, without encryption and without a password: everyone who can connect to them can "
                "use its models and end the requests of others. Set internal_tls, or let a firewall or a NetworkPolicy "
                "admit routers only"
            )


def public_listen_warning(config: MeshConfig, published_at: str | None = None) -> str | None:
    """The warning about a public API that other machines may reach.

    None if they need a key or a certificate over an encrypted connection, or cannot reach it.
    """
    if not _is_public(published_at or config.listen) or _needs_certificates(config):
        return None
    listen = f"{config.listen}, published at {published_at}," if published_at else config.listen
    address, is_encrypted, needs_keys = f"listen: {listen}", config.tls is not None, _needs_keys(config)
    if is_encrypted and needs_keys:
        return None
    if is_encrypted:
        return (
            f"WARNING: {address} can be reached from other machines, without a password: everyone who can connect to "
            "it can use the models. Set access: {mode: keys}, or tls.client_ca so that clients need a certificate"
        )
    if needs_keys:
        return (
            f"WARNING: {address} can be reached from other machines, without encryption: API keys, prompts and outputs "
            "cross the network as they are. Set `tls`, or put a proxy with TLS before it"
        )
    return (
        f"WARNING: {address} can be reached from other machines, without encryption and without a password: everyone "
        "who can connect to it can use the models, and prompts and outputs cross the network unencrypted. Set `tls` "
        "and access: {mode: keys}, or put a proxy with TLS and authentication before it"
    )


def _needs_keys(config: MeshConfig) -> bool:
    return config.access.mode == "keys"


def _needs_certificates(config: MeshConfig) -> bool:
    return config.tls is not None and config.tls.client_ca is not None


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
