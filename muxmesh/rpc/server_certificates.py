"""The certificates of the public server, as the section `tls` of mesh.yaml names them: reads and checks the files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from muxmesh.config.tls_config import TlsConfig
from muxmesh.rpc.pem_files import KeyPair, PemFileError, PemKind, raw_contents, read_ca_certificates, read_key_pair

_FIELDS: dict[PemKind, str] = {"cert": "cert", "key": "key", "ca": "client_ca"}


@dataclass(frozen=True, slots=True)
class ServerCertificates:
    """What a TLS server needs."""

    pair: KeyPair
    client_ca: bytes | None
    """Certificates of the CAs of clients, in PEM format. None: clients need no certificate."""


def read_server_certificates(tls: TlsConfig) -> ServerCertificates:
    """Reads and checks the files. Raises PemFileError. Whether the certificate has expired is not checked."""
    pair = read_key_pair(Path(tls.cert), Path(tls.key), "server")
    return ServerCertificates(pair, read_ca_certificates(Path(tls.client_ca)) if tls.client_ca else None)


def unchecked_contents(tls: TlsConfig) -> tuple[bytes | str, ...]:
    """The bytes of each file, or why it cannot be read."""
    return raw_contents(Path(path) for path in (tls.cert, tls.key, tls.client_ca) if path is not None)


def certificate_problems(tls: TlsConfig, now_s: float) -> Iterator[tuple[str, str]]:
    """(field, problem) of files with which no client could connect at ``now_s``, in seconds since 1970."""
    try:
        served = read_server_certificates(tls)
    except PemFileError as error:
        yield _FIELDS[error.kind], str(error)
        return
    if (problem := served.pair.time_problem(now_s)) is not None:
        yield "cert", f"{tls.cert}: {problem}"
