"""Channels between services of the mesh. Knows addresses, no services."""

from __future__ import annotations

import grpc

from muxmesh.rpc.limits import MAX_MESSAGE_BYTES, keepalive_options

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # The supervisor restarts a worker within seconds, so reconnects do not back off for long.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # The least time for one attempt to connect. A process that is stopped by a signal neither refuses nor responds:
    # calls wait until it continues, or until it is killed, which resets the connection.
    ("grpc.min_reconnect_backoff_ms", 20_000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Without it, channels to one address share a connection and its reconnect back-off.
    ("grpc.use_local_subchannel_pool", 1),
)
_NETWORK_OPTIONS = (
    *_OPTIONS,
    *keepalive_options(15.0, 5.0),
    # A host that is gone does not respond either, and its successor has another address under the same name: the name
    # is resolved again after an attempt has failed, at most this often. gRPC's own interval is 30 s.
    ("grpc.min_reconnect_backoff_ms", 3000),
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
    ("grpc.enable_http_proxy", 0),
)
"""For addresses that are no unix sockets. Of an option that is listed twice, the last value counts."""


def internal_channel(address: str, credentials: grpc.ChannelCredentials | None = None) -> grpc.aio.Channel:
    """Opens a channel to a service of the mesh: unix:PATH on this host, HOST:PORT on any.

    ``credentials``: for TLS with the latter; None: plain text.
    """
    if address.startswith("unix:"):
        return grpc.aio.insecure_channel(address, options=_OPTIONS)
    options = tuple(dict(_NETWORK_OPTIONS).items())
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)
