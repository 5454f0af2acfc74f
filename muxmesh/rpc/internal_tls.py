"""TLS between routers and the ports of units, in both directions: each side checks the certificate of the other one.

Unix sockets have none: only the user of the mesh can connect to them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from muxmesh.background_task import background
from muxmesh.clock import Clock
from muxmesh.config.runtime import Endpoint
from muxmesh.config.tls_config import InternalTlsConfig
from muxmesh.errors import ConfigError
from muxmesh.rpc.pem_files import PemFileError, read_ca_certificates, read_key_pair
from muxmesh.rpc.server_certificates import certificate_problems
from muxmesh.rpc.server_credentials import ReloadedCredentials

FIELD = "internal_tls"


def internal_channel_credentials(tls: InternalTlsConfig | None) -> grpc.ChannelCredentials | None:
    """What a router presents to units, and by which it checks them; None without TLS. Raises ConfigError.

    The files are read once: new connections after a renewal need another router process.
    """
    if tls is None:
        return None
    try:
        pair = read_key_pair(Path(tls.cert), Path(tls.key), "client")
        return grpc.ssl_channel_credentials(read_ca_certificates(Path(tls.ca)), pair.key, pair.cert)
    except PemFileError as error:
        raise ConfigError(f"{FIELD}: {error}") from error


@asynccontextmanager
async def internal_server_credentials(
    tls: InternalTlsConfig | None, endpoint: Endpoint, clock: Clock, give_up: Callable[[str], None]
) -> AsyncIterator[dict[str, grpc.ServerCredentials]]:
    """The credentials by address of a service of a unit: of its port, if it has one. Reloaded while the block runs."""
    ports = [address for address in endpoint.listen if not address.startswith("unix:")]
    if tls is None or not ports:
        yield {}
        return
    reloaded = ReloadedCredentials(tls.of_server(), clock, FIELD)
    async with background(reloaded.watch(), "certificates", give_up):
        yield dict.fromkeys(ports, reloaded.credentials)


def internal_certificate_problems(tls: InternalTlsConfig, now_s: float) -> Iterator[tuple[str, str]]:
    """(field, problem) of files with which no router and unit could connect at ``now_s``, in seconds since 1970."""
    found = list(certificate_problems(tls.of_server(), now_s))
    for field, problem in found:
        yield {"client_ca": "ca"}.get(field, field), problem
    if not found:
        try:
            read_key_pair(Path(tls.cert), Path(tls.key), "client")
        except PemFileError as error:
            yield error.kind, f"{error}; a router presents it to units, so it has to be for clients too"
