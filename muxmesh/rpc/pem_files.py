"""Certificates and private keys in PEM files: reads them, and reports what is wrong where gRPC would give no reason.

Knows files and OpenSSL; neither gRPC nor the configuration.
"""

from __future__ import annotations

import binascii
import contextlib
import os
import ssl
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

PemKind = Literal["cert", "key", "ca"]
Side = Literal["server", "client"]

_BEGIN_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"
_NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL: a certificate that has expired can be read too."""
_MISMATCHES = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")
"""OpenSSL's reasons for a key that is not that of the certificate; the last one: the key is of another algorithm."""
_HANDSHAKE_FLIGHTS = 3
_MAX_BYTES = 1 << 20
_EDWARDS_CURVES = (bytes.fromhex("300506032b6570"), bytes.fromhex("300506032b6571"))
"""The algorithm in a PKCS #8 key (RFC 8410) that is Ed25519 or Ed448."""


class PemFileError(Exception):
    """A file cannot be used. ``kind`` is what it should hold."""

    def __init__(self, kind: PemKind, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.kind = kind
        self.path = path
        self.problem = problem


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate, followed by those of intermediate CAs, and its private key, in PEM format."""

    cert: bytes
    key: bytes = field(repr=False)
    not_before_s: int
    """Seconds since 1970 from which the certificate is valid."""
    not_after_s: int
    """Seconds since 1970 until which the certificate is valid."""

    def time_problem(self, now_s: float) -> str | None:
        """Why the certificate is not valid at ``now_s``, in seconds since 1970; None if it is."""
        if now_s > self.not_after_s:
            return f"has expired on {utc_date(self.not_after_s)}; renew it"
        if now_s < self.not_before_s:
            return f"is not valid before {utc_date(self.not_before_s)}; is the clock of this machine right?"
        return None


def utc_date(unix_s: float) -> str:
    """The date and time in UTC, to the minute."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


def read_key_pair(cert: Path, key: Path, side: Side) -> KeyPair:
    """Reads a certificate and its key, for a server or a client. Raises PemFileError.

    OpenSSL reads the files by their paths. If their content changes meanwhile, that is an error too.
    """
    contents = _read(cert, "cert"), _read(key, "key")
    _check_certificate(cert, contents[0])
    _check_key(key, contents[1])
    _load(cert, key, ssl.PROTOCOL_TLS_SERVER)
    not_before_s, not_after_s = _validity(cert, key, contents[0], side)
    if contents != (_read(cert, "cert"), _read(key, "key")):
        raise PemFileError("cert", cert, "was replaced while it was read")
    return KeyPair(*contents, not_before_s, not_after_s)


def read_ca_certificates(path: Path) -> bytes:
    """Reads the certificates of one or several CAs. Raises PemFileError.

    The certificate of a peer itself may stand for its CA: gRPC then trusts that one alone.
    """
    content = _read(path, "ca")
    _add_trusted(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), "ca", path, content)
    return content


def raw_contents(paths: Iterable[Path]) -> tuple[bytes | str, ...]:
    """The bytes of each file, unchecked, or why it cannot be read: they are compared to see whether files changed."""
    return tuple(map(_raw, paths))


def _raw(path: Path) -> bytes | str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: no path can have such a character
        return _unreadable(error)


def _unreadable(error: OSError | ValueError) -> str:
    reason = getattr(error, "strerror", None) or error
    user = f" by uid {os.geteuid()}" if isinstance(error, PermissionError) and hasattr(os, "geteuid") else ""
    return f"cannot be read{user}: {reason}"


def _read(path: Path, kind: PemKind) -> bytes:
    content = _raw(path)
    if isinstance(content, str):
        raise PemFileError(kind, path, content)
    if len(content) > _MAX_BYTES:
        raise PemFileError(kind, path, f"has more than {_MAX_BYTES} bytes; a PEM file is needed")
    return content


def _check_certificate(path: Path, content: bytes) -> None:
    if _BEGIN_CERTIFICATE not in content and b"PRIVATE KEY-----" in content:
        raise PemFileError("cert", path, "has a private key and no certificate; are cert and key exchanged?")
    _add_trusted(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), "cert", path, content)


def _check_key(path: Path, content: bytes) -> None:
    """Raises PemFileError for a key that no one could use here, before OpenSSL calls all of them `PEM lib`."""
    _, begin, rest = content.partition(b"PRIVATE KEY-----")
    if not begin:
        raise PemFileError("key", path, "has no private key; a PEM file with `-----BEGIN PRIVATE KEY-----` is needed")
    if b"ENCRYPTED" in content:
        raise PemFileError("key", path, "is encrypted; a key without a passphrase is needed")
    try:
        der = binascii.a2b_base64(rest.partition(b"-----")[0])
    except binascii.Error:
        return
    if any(algorithm in der[:32] for algorithm in _EDWARDS_CURVES):
        raise PemFileError("key", path, "is of Ed25519 or Ed448, which gRPC does not serve; use ECDSA or RSA")


def _add_trusted(context: ssl.SSLContext, kind: PemKind, path: Path, content: bytes) -> None:
    """Adds the certificates in ``content`` to those that ``context`` trusts."""
    if _BEGIN_CERTIFICATE not in content:
        raise PemFileError(kind, path, f"has no certificate; a PEM file with `{_BEGIN_CERTIFICATE.decode()}` is needed")
    try:
        context.load_verify_locations(cadata=content.decode("ascii", errors="ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise PemFileError(kind, path, "has a certificate that is incomplete or damaged") from error


def _load(cert: Path, key: Path, protocol: int) -> ssl.SSLContext:
    """A context with the certificate, both of whose files have been checked one by one."""
    context = ssl.SSLContext(protocol)
    try:
        context.load_cert_chain(cert, key, password="")
    except ssl.SSLError as error:
        if error.reason in _MISMATCHES:
            raise PemFileError("key", key, f"is not the key of the certificate in {cert}") from error
        if error.reason is None:
            raise PemFileError("key", key, "has a private key that is incomplete or damaged") from error
        raise PemFileError("cert", cert, f"is refused by OpenSSL: {_reason(error)}") from error
    except OSError as error:  # a file is gone since it was read
        raise PemFileError("cert", cert, _unreadable(error)) from error
    return context


def _validity(cert: Path, key: Path, content: bytes, side: Side) -> tuple[int, int]:
    """From and until when a certificate is valid, in seconds since 1970.

    `ssl` decodes certificates of peers only. So a server and a client in memory shake hands, which also shows that the
    certificate is one for ``side``.
    """
    server, client = (_load(cert, key, one) for one in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT))
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    verifier = client if side == "server" else server
    _add_trusted(verifier, "cert", cert, content)
    verifier.verify_mode = ssl.CERT_REQUIRED
    verifier.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)
    try:
        for _ in range(_HANDSHAKE_FLIGHTS):
            for end in ends:
                _shake_hands(end)
    except ssl.SSLError as error:
        raise PemFileError("cert", cert, f"cannot be that of a {side}: {_reason(error)}") from error
    facts = ends[0 if side == "server" else 1].getpeercert() or {}
    not_before, not_after = (ssl.cert_time_to_seconds(str(facts[name])) for name in ("notBefore", "notAfter"))
    return not_before, not_after


def _shake_hands(end: ssl.SSLObject) -> None:
    with contextlib.suppress(ssl.SSLWantReadError):
        end.do_handshake()


def _reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return (error.reason or str(error)).replace("_", " ").lower()
