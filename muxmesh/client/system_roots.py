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


def system_roots(environment: Mapping[str, str], bundles: tuple[str, ...] = _BUNDLES) -> bytes | None:
    """The certificates of the system's CAs, in PEM format: those of SSL_CERT_FILE, of OpenSSL, or a known bundle.

    None: gRPC is to use its own, or those that GRPC_DEFAULT_SSL_ROOTS_FILE_PATH in ``environment`` names.
    """
    if environment.get(_GRPC_VARIABLE):
        return None
    for name in (environment.get("SSL_CERT_FILE"), ssl.get_default_verify_paths().cafile, *bundles):
        try:
            content = Path(name).read_bytes() if name else b""
        except OSError:
            continue
        if b"-----BEGIN CERTIFICATE-----" in content:
            return content
    return None
