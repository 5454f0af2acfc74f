"""How far a worker's sequences are computed, in shared memory that outlives the worker.

Each attached worker has a memfd with a slot for each lease that it works on:

    8 bytes                lease id; 0: the slot is free
    8 bytes                number of hashes
    max_blocks * 16        hashes of the first full token blocks of the lease, whose KV is in the pool

The worker writes the hashes before their number. kvstore reads the page only after the worker's processes have exited,
and publishes these blocks. So a request that is retried after a worker was killed finds its KV in the prefix cache.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from kvstore.device_memory import new_memfd
from muxmesh.block_hashes import HASH_BYTES

_HEADER_WORDS = 2


class ProgressPage:
    """The slots, over a mapping that one worker and kvstore share. An aligned 8-byte store is atomic.

    The worker calls `begin`, `commit` and `end`; kvstore calls `read`.
    """

    def __init__(self, fd: int, num_slots: int, max_blocks: int) -> None:
        """``max_blocks``: full token blocks of the longest sequence. The caller may close ``fd`` afterwards."""
        self._num_slots, self._max_blocks = num_slots, max_blocks
        self._slot_bytes = page_bytes(1, max_blocks)
        self._map = mmap.mmap(fd, page_bytes(num_slots, max_blocks))
        self._words = memoryview(self._map).cast("Q")
        self._slots: dict[int, int] = {}

    def begin(self, lease_id: int) -> None:
        """Takes a slot for a lease.

        Without a free slot its progress is not recorded: after a fault its KV is computed again.
        """
        free = next((slot for slot in range(self._num_slots) if slot not in self._slots.values()), None)
        if free is not None:
            self._slots[lease_id] = free
            word = free * self._slot_bytes // 8
            self._words[word + 1] = 0
            self._words[word] = lease_id

    def commit(self, lease_id: int, first_block: int, hashes: Sequence[bytes]) -> None:
        """Records that the blocks from ``first_block`` on are computed; earlier ones were committed before.

        Hashes past ``max_blocks`` are dropped. A lease without a slot is ignored.
        """
        slot = self._slots.get(lease_id)
        if slot is None:
            return
        at = slot * self._slot_bytes
        start = at + 8 * _HEADER_WORDS + HASH_BYTES * first_block
        data = b"".join(hashes[: self._max_blocks - first_block])
        self._map[start : start + len(data)] = data
        self._words[at // 8 + 1] = first_block + len(data) // HASH_BYTES

    def end(self, lease_id: int) -> None:
        """Frees the slot of a lease. To be called before the lease's blocks are freed."""
        slot = self._slots.pop(lease_id, None)
        if slot is not None:
            self._words[slot * self._slot_bytes // 8] = 0

    def read(self) -> dict[int, tuple[bytes, ...]]:
        """Lease id → hashes of its computed blocks, for every lease that has a slot."""
        found = {}
        for slot in range(self._num_slots):
            at = slot * self._slot_bytes
            lease_id, count = self._words[at // 8], self._words[at // 8 + 1]
            if lease_id:
                first = at + 8 * _HEADER_WORDS
                starts = range(first, first + HASH_BYTES * min(count, self._max_blocks), HASH_BYTES)
                found[lease_id] = tuple(self._map[start : start + HASH_BYTES] for start in starts)
        return found

    def close(self) -> None:
        self._words.release()
        self._map.close()


def page_bytes(num_slots: int, max_blocks: int) -> int:
    """Size of a page in bytes."""
    return num_slots * (8 * _HEADER_WORDS + HASH_BYTES * max_blocks)


def new_progress_fd(num_slots: int, max_blocks: int) -> int:
    """Returns a new memfd for a page. The caller closes it."""
    return new_memfd("muxmesh-progress", page_bytes(num_slots, max_blocks))
