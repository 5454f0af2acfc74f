"""The messages of the attach socket, its limits, and the description of the pool. No socket: see `attach_server`.

Messages are JSON. The first one comes from the process that attaches, and kvstore replies with file descriptors:

    first message                        reply                                               file descriptors
    {"role", "model", "address", "kv"}   {"worker", "slot", "progress", "pool", "weights",   pool, swap, weights, worker
                                          "engine"}
    {"writer_for": WORKER}               {"worker", "pool"}                                  pool, swap
    any that is refused                  {"refused": REASON}

    kv        what the KV of the model depends on (`KvIdentity.text`); every worker sends it

    pool      the segments of the pool, in the order of `pool_description`, each unless it has an IPC handle
    swap      the swap region, if the unit has one
    weights   the segment of the model's weights, unless it has an IPC handle, and the weights page; or nothing
    worker    grant page, doorbell, the worker's bell, its progress page
    engine    an `EngineState`: a worker that is to start asleep loads no model

    A segment is described as [size in bytes, device UUID or "", IPC handle in hexadecimal or ""].

``writer_for`` is for a further process that writes into the pool for an attached worker, such as an engine core. After
a reply a worker sends

    {"num_sms": int, "mps": bool}    on a GPU, once its context exists: what its driver says of its share. The unit
                                     replies {"refused": ""}, or {"refused": REASON} and counts the worker as not ready
    {"ready": bool}                  whenever that changes
    {"done": int}                    its engine is what the command of this number told it to be

and kvstore sends it, whenever its engine is to change,

    {"engine": STATE, "number": int}
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from kvstore.device_memory import DeviceMemory, Segment

MAX_MESSAGE_BYTES = 64 * 1024
MAX_FDS = 250
"""The kernel passes at most 253 file descriptors in one message."""
BEAT_EVERY_S = 0.5
"""Interval of a worker's heartbeats, and of kvstore's checks of them."""
MAX_SILENT_CHECKS = 20
"""A ready worker is killed after this many checks in a row without a heartbeat: 10 s."""
MAX_UNANSWERED_CHECKS = 600
"""A worker whose engine has not fallen asleep or woken as told after this many checks is killed: 300 s, far longer than
it takes to load weights again.
"""


def send_message(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """Sends a message without file descriptors. Does nothing if the other side is gone."""
    with contextlib.suppress(OSError):
        connection.send(json.dumps(message).encode())


def pool_description(memory: DeviceMemory, slab_bytes: int, has_swap: bool) -> dict[str, Any]:
    """The pool as a JSON object. Its segments are sent as file descriptors in the same order.

    ``shards`` lists the segments of each shard. ``num_sms``: of the whole device. ``swap``: whether a swap region
    follows.
    """
    return {
        "device": memory.kind,
        "transport": memory.transport,
        "num_sms": memory.num_sms,
        "slab_bytes": slab_bytes,
        "shards": [[segment_description(one) for one in shard.segments] for shard in memory.shards],
        "swap": has_swap,
    }


def segment_description(segment: Segment) -> list[Any]:
    """A segment as a JSON array."""
    return [segment.size_bytes, segment.device_uuid, segment.ipc_handle.hex()]


def num_segment_fds(description: Sequence[Any]) -> int:
    """Number of file descriptors that belong to a segment's description: one or none."""
    return 0 if description[2] else 1


def num_pool_fds(description: Mapping[str, Any]) -> int:
    """Number of file descriptors that belong to a pool description: the segments, and the swap region if any."""
    segments = [segment for shard in description["shards"] for segment in shard]
    return sum(map(num_segment_fds, segments)) + bool(description["swap"])
