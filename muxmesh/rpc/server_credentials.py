"""The TLS credentials of a server, whose certificates may be replaced on disk while it serves.

gRPC asks for the certificates at the beginning of each connection, in threads of its own that Python has not started.
So what it calls only takes a value that is there. Another thread reads the files once a second; `certificate_reload`
decides.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

import grpc

from muxmesh.clock import Clock
from muxmesh.config.tls_config import TlsConfig
from muxmesh.errors import ConfigError
from muxmesh.rpc.certificate_reload import CertificateReload
from muxmesh.rpc.pem_files import PemFileError
from muxmesh.rpc.server_certificates import ServerCertificates, read_server_certificates, unchecked_contents

_log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0


class ReloadedCredentials:
    """The credentials for one address, and the files that they come from."""

    def __init__(self, tls: TlsConfig, clock: Clock, field: str = "tls") -> None:
        """``field``: the section of mesh.yaml, for messages. Raises ConfigError if the files cannot be used.

        A certificate that has expired is used: its renewal is then loaded without a restart.
        """
        self._tls = tls
        self._clock = clock
        self._field = field
        self._fresh: deque[grpc.ServerCertificateConfiguration] = deque(maxlen=1)
        """What gRPC has not taken yet. Its operations are atomic."""
        self._contents = unchecked_contents(tls)
        """Of the files at the last look."""
        try:
            first = read_server_certificates(tls)
        except PemFileError as error:
            raise ConfigError(f"{field}: {error}") from error
        self._seen: ServerCertificates | str = first
        """What `_contents` are."""
        self._reload = CertificateReload(first)
        self.credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            _configuration(first),
            self._take,  # type: ignore[arg-type] # the stub does not know that None means "no change"
            require_client_authentication=first.client_ca is not None,
        )

    def look(self) -> None:
        """Reads the files. If they hold other certificates that can be used, new connections get those."""
        before = self._reload.in_use
        if (contents := unchecked_contents(self._tls)) != self._contents:
            self._contents, self._seen = contents, self._read()
        if (line := self._reload.observe(self._seen, self._clock.unix_s())) is not None:
            _log.log(line.level, "%s: %s: %s", self._field, self._tls.cert, line.text)
        if self._reload.in_use is not before:
            self._fresh.append(_configuration(self._reload.in_use))

    async def watch(self) -> None:
        """Looks at the files until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await asyncio.to_thread(self.look)

    def _take(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC for each new connection. None: nothing has changed since the last call."""
        try:
            return self._fresh.pop()
        except IndexError:
            return None

    def _read(self) -> ServerCertificates | str:
        try:
            return read_server_certificates(self._tls)
        except PemFileError as error:
            return str(error)


def _configuration(served: ServerCertificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(served.pair.key, served.pair.cert)], served.client_ca)
