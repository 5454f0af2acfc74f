"""What both ends of the attach socket have to know: limits, and how the pool is described.

A worker's first message names it: ``{"role", "model", "address"}``. A further process that writes into the pool for a
worker, such as an engine core of its own, sends ``{"writer_for": NAME}`` instead. The answer describes the pool
(`pool_description`) and comes with file descriptors: the segments of the pool, then the swap region if there is one;
a worker gets four more: grant page, doorbell, its bell, its progress page.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvstore.device_memory import DeviceMemory

MAX_MESSAGE_BYTES = 64 * 1024
MAX_FDS = 250
"""The kernel passes at most 253 in one message."""
NUM_WORKER_FDS = 4
BEAT_EVERY_S = 0.5
MAX_SILENT_CHECKS = 20
"""Checks of an unchanged heartbeat after which its worker is killed: 10 s."""


def pool_description(memory: DeviceMemory, slab_bytes: int, has_swap: bool) -> dict[str, Any]:
    """The pool as JSON; its segments are sent as file descriptors in the same order."""
    return {
        "device": memory.kind,
        "slab_bytes": slab_bytes,
        "shards": [[[one.size_bytes, one.device_uuid] for one in shard.segments] for shard in memory.shards],
        "swap": has_swap,
    }


def num_pool_fds(description: Mapping[str, Any]) -> int:
    """File descriptors that belong to a pool description."""
    return sum(len(shard) for shard in description["shards"]) + bool(description["swap"])
