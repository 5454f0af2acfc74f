"""Channels inside the mesh and to it."""

from __future__ import annotations

import grpc

from muxmesh.rpc.limits import MAX_MESSAGE_BYTES

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A worker is back within seconds: try again soon.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Every part of the mesh has its own channel to each address.
    ("grpc.use_local_subchannel_pool", 1),
)


def internal_channel(address: str) -> grpc.aio.Channel:
    """A channel to a service of the mesh on this host."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)
