"""The TLS settings of a client: its files, the environment variables that name them, and the credentials for gRPC."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc

from muxmesh.client.system_roots import system_roots
from muxmesh.errors import InvalidRequest
from muxmesh.rpc.pem_files import KeyPair, PemFileError, read_ca_certificates, read_key_pair

CA_VARIABLE, CERT_VARIABLE, KEY_VARIABLE = "MUXMESH_TLS_CA", "MUXMESH_TLS_CERT", "MUXMESH_TLS_KEY"

FilePath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Tls:
    """How a client uses TLS. Files are in PEM format. Raises InvalidRequest for a certificate without a key."""

    ca: FilePath | None = None
    """Certificates of the CAs of which one has signed the server's, or the server's own. None: the CAs that this system
    trusts."""
    cert: FilePath | None = None
    """The client's own certificate, for a mesh with `tls.client_ca`."""
    key: FilePath | None = None
    """The private key of `cert`, without a passphrase."""
    server_name: str | None = None
    """The name that the server's certificate has to be for. None: the host of the address."""

    def __post_init__(self) -> None:
        if (self.cert is None) is not (self.key is None):
            missing, given = ("key", "cert") if self.key is None else ("cert", "key")
            raise InvalidRequest(
                f"tls.{missing}", f"is missing beside {given}: a certificate and its key are used together"
            )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self | None:
        """The files that MUXMESH_TLS_CA, MUXMESH_TLS_CERT and MUXMESH_TLS_KEY name; None if none of them is set."""
        ca, cert, key = (environment.get(name) or None for name in (CA_VARIABLE, CERT_VARIABLE, KEY_VARIABLE))
        return None if ca is cert is key is None else cls(ca, cert, key)


@dataclass(frozen=True, slots=True)
class TlsCredentials:
    """What gRPC needs for TLS, read from the files."""

    settings: Tls
    credentials: grpc.ChannelCredentials
    pair: KeyPair | None
    """The client's own certificate."""

    @property
    def options(self) -> tuple[tuple[str, str], ...]:
        """Options of the channel."""
        name = self.settings.server_name
        return () if name is None else (("grpc.ssl_target_name_override", name),)


def read_credentials(tls: Tls | bool) -> TlsCredentials | None:
    """Reads the files. True: TLS with the CAs of the system; False: none. Raises InvalidRequest."""
    if tls is False:
        return None
    if tls is True:
        tls = Tls()
    if not isinstance(tls, Tls):
        raise InvalidRequest("tls", f"is of the type {type(tls).__name__}; Tls(...), True or False is needed")
    try:
        roots = system_roots(os.environ) if tls.ca is None else read_ca_certificates(Path(tls.ca))
        pair = None
        if tls.cert is not None and tls.key is not None:
            pair = read_key_pair(Path(tls.cert), Path(tls.key), "client")
    except PemFileError as error:
        raise InvalidRequest(f"tls.{error.kind}", str(error)) from error
    key, cert = (None, None) if pair is None else (pair.key, pair.cert)
    return TlsCredentials(tls, grpc.ssl_channel_credentials(roots, key, cert), pair)
