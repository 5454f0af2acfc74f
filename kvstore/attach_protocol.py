"""The messages of the attach socket, its limits, and the description of the pool. No socket: see `attach_server`.

Messages are JSON. The first one comes from the process that attaches, and kvstore replies with file descriptors:

    first message                    reply                                        file descriptors
    {"role", "model", "address"}     {"worker", "slot", "progress", "pool"}       pool, swap, worker
    {"writer_for": WORKER}           {"worker", "pool"}                           pool, swap

    pool      the segments of the pool, in the order of `pool_description`
    swap      the swap region, if the unit has one
    worker    grant page, doorbell, the worker's bell, its progress page

``writer_for`` is for a further process that writes into the pool for an attached worker, such as an engine core. A
closed connection instead of a reply is a refusal. Afterwards a worker sends ``{"ready": bool}`` whenever that changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvstore.device_memory import DeviceMemory

MAX_MESSAGE_BYTES = 64 * 1024
MAX_FDS = 250
"""The kernel passes at most 253 file descriptors in one message."""
BEAT_EVERY_S = 0.5
"""Interval of a worker's heartbeats, and of kvstore's checks of them."""
MAX_SILENT_CHECKS = 20
"""A ready worker is killed after this many checks in a row without a heartbeat: 10 s."""


def pool_description(memory: DeviceMemory, slab_bytes: int, has_swap: bool) -> dict[str, Any]:
    """The pool as a JSON object. Its segments are sent as file descriptors in the same order.

    ``shards`` lists for each shard the [size in bytes, device UUID] of its segments. ``swap``: whether a swap region
    follows.
    """
    return {
        "device": memory.kind,
        "slab_bytes": slab_bytes,
        "shards": [[[one.size_bytes, one.device_uuid] for one in shard.segments] for shard in memory.shards],
        "swap": has_swap,
    }


def num_pool_fds(description: Mapping[str, Any]) -> int:
    """Number of file descriptors that belong to a pool description: the segments, and the swap region if any."""
    return sum(len(shard) for shard in description["shards"]) + bool(description["swap"])
