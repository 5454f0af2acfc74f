"""Channels between services of the mesh. Knows addresses, no services."""

from __future__ import annotations

import grpc

from muxmesh.rpc.limits import MAX_MESSAGE_BYTES

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


def internal_channel(address: str) -> grpc.aio.Channel:
    """Opens a channel to a service of the mesh on this host."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)
