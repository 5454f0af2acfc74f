"""What the details of a failed connection say about TLS, in words of the mesh: the cause and the remedy.

gRPC reports the words of its TLS library if the client ends the handshake. If the server ends it, the client sees only
that the connection was closed.
"""

from __future__ import annotations

import re

from muxmesh.client.tls import TlsCredentials
from muxmesh.rpc.pem_files import utc_date

_CLOSED = re.compile(r"Socket closed|Connection reset|Broken pipe|Handshake read failed", re.IGNORECASE)
_PROBLEMS = (
    (
        r"WRONG_VERSION_NUMBER|HTTP_REQUEST",
        "that server speaks no TLS; call it without TLS, or set `tls` in its mesh.yaml",
    ),
    (
        r"certificate has expired",
        "the server's certificate has expired; renew it, which a running mesh notices by itself. Or the clock of this "
        "machine is wrong",
    ),
    (
        r"certificate is not yet valid",
        "the server's certificate is not valid yet; compare the clocks of both machines",
    ),
    (
        r"Hostname Verification Check failed|is not in peer certificate",
        "the server's certificate is for another name; use one of its names in the address, or set server_name "
        "(--tls-server-name)",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED",
        "the server's certificate is not signed by a CA that this client trusts; name the CA's certificate as `ca` "
        "(--tls-ca)",
    ),
)


def tls_problem(details: str) -> str | None:
    """The cause and the remedy, if the client has ended the TLS handshake. ``details``: those of gRPC's error."""
    found = next((problem for pattern, problem in _PROBLEMS if re.search(pattern, details, re.IGNORECASE)), None)
    if found is None and "TSI_" in details:
        return f"the TLS handshake failed: {details}"
    return found


def closed_hint(details: str, tls: TlsCredentials | None) -> str | None:
    """What may be wrong with TLS if the server has closed a connection before the first response.

    None if it has not been closed, or may not be for TLS. A server that stops closes connections too.
    """
    if not _CLOSED.search(details):
        return None
    if tls is None:
        return "if that server serves TLS, call it with `tls` (--tls or --tls-ca)"
    if tls.pair is None:
        return "if that server asks for a certificate of the client, set `cert` and `key` (--tls-cert, --tls-key)"
    return (
        f"if that server has not accepted the client's certificate, which is valid until "
        f"{utc_date(tls.pair.not_after_s)}, use one of the CA in its `tls.client_ca`"
    )
