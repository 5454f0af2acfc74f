"""What the details of gRPC's errors mean. `test_tls` has those of the present version; these are words of others."""

import pytest

from muxmesh.client.tls_errors import closed_hint, tls_problem

SSL = "SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:"


@pytest.mark.parametrize(
    ("details", "beginning"),
    [
        ("Peer name 127.0.0.1 is not in peer certificate", "the server's certificate is for another name"),
        (f"{SSL}CERTIFICATE_VERIFY_FAILED: self signed certificate", "the server's certificate is not signed by a CA"),
        (f"{SSL}CERTIFICATE_VERIFY_FAILED: certificate is not yet valid", "the server's certificate is not valid yet"),
        (f"{SSL}CERTIFICATE_VERIFY_FAILED: certificate has expired", "the server's certificate has expired"),
        (f"{SSL}HTTP_REQUEST", "that server speaks no TLS"),
        (
            "Ssl handshake failed (TSI_PROTOCOL_FAILURE): something new",
            "the TLS handshake failed: Ssl handshake failed (TSI_PROTOCOL_FAILURE): something new",
        ),
    ],
)
def test_the_cause_is_named(details: str, beginning: str) -> None:
    problem = tls_problem(details)
    assert problem is not None
    assert problem.startswith(beginning)


@pytest.mark.parametrize("details", ["Connection refused", "Socket closed", "Name resolution failed", ""])
def test_other_failures_are_not_of_tls(details: str) -> None:
    assert tls_problem(details) is None


@pytest.mark.parametrize(
    ("details", "is_closed"),
    [
        ("Socket closed", True),
        ("recvmsg:Connection reset by peer", True),
        ("Handshake read failed (Socket closed)", True),
        ("sendmsg: Broken pipe", True),
        ("Connection refused", False),
    ],
)
def test_only_a_closed_connection_may_be_for_tls(details: str, is_closed: bool) -> None:
    assert (closed_hint(details, None) is not None) is is_closed
