"""The CAs that this system trusts. gRPC by itself trusts those that it comes with, and knows none that were added."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path

_GRPC_VARIABLE = "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"
_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Alpine
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, RHEL
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",  # macOS
)


def system_roots(environment: Mapping[str, str]) -> bytes | None:
    """The certificates of the system's CAs, in PEM format: those of SSL_CERT_FILE, of OpenSSL, or a known bundle.

    None: gRPC is to use its own, or those that GRPC_DEFAULT_SSL_ROOTS_FILE_PATH in ``environment`` names.
    """
    if environment.get(_GRPC_VARIABLE):
        return None
    return first_bundle(ssl.get_default_verify_paths().cafile, *_BUNDLES)


def first_bundle(*paths: str | None) -> bytes | None:
    """The content of the first of these files that has certificates; None if none has."""
    for path in filter(None, paths):
        try:
            content = Path(path).read_bytes()
        except OSError:
            continue
        if b"-----BEGIN CERTIFICATE-----" in content:
            return content
    return None
