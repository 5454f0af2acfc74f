"""Limits and options that client and server share. Has no imports, so that the client can use it."""

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Size limit of one message, in either direction."""


def keepalive_options(time_s: float, timeout_s: float) -> tuple[tuple[str, int], ...]:
    """Options of gRPC that end a connection over which nothing arrives: a ping after ``time_s``, the end ``timeout_s``
    later. Without them a host that is gone, and closes no connection, is not noticed.
    """
    timeout_ms = int(1000 * timeout_s)
    return (
        ("grpc.keepalive_time_ms", int(1000 * time_s)),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.keepalive_permit_without_calls", 1),
    )
