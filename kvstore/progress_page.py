"""How far a worker's sequences are computed, and how much is left, in shared memory that outlives the worker.

Each attached worker has a memfd with a slot for each lease that it works on:

    8 bytes                lease id; 0: the slot is free
    8 bytes                number of hashes
    8 bytes                bit 0: the batch has the sequence; bit 1: it is nearly done; from bit 8 on: how often it was
                           displaced
    8 bytes                its remaining decode work in seconds, a float64; NaN: as in its request
    8 bytes                its work done in seconds, a float64
    max_blocks * 16        hashes of the first full token blocks of the lease, whose KV is in the pool

The worker writes the hashes before their number. kvstore reads them only after the worker's processes have exited, and
publishes these blocks. So a request that is retried after a worker was killed finds its KV in the prefix cache. It
reads the other words at any time, to decide which sequence a queued request may displace; a value that is some tokens
old does no harm.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

from kvstore.device_memory import new_memfd
from kvstore.sequence_progress import SequenceProgress
from muxmesh.block_hashes import HASH_BYTES

_HEADER_WORDS = 5
_LEASE, _COUNT, _FLAGS, _REMAINING, _SERVED = range(_HEADER_WORDS)
_IS_BATCHED, _IS_PROTECTED, _PREEMPTIONS_SHIFT = 1, 2, 8


class ProgressPage:
    """The slots, over a mapping that one worker and kvstore share. An aligned 8-byte store is atomic.

    The worker calls `begin`, `commit`, `report` and `end`; kvstore calls `read` and `reports`.
    """

    def __init__(self, fd: int, num_slots: int, max_blocks: int) -> None:
        """``max_blocks``: full token blocks of the longest sequence. The caller may close ``fd`` afterwards."""
        self._num_slots, self._max_blocks = num_slots, max_blocks
        self._slot_bytes = page_bytes(1, max_blocks)
        self._map = mmap.mmap(fd, page_bytes(num_slots, max_blocks))
        self._words = memoryview(self._map).cast("Q")
        self._seconds = memoryview(self._map).cast("d")
        self._slots: dict[int, int] = {}

    def begin(self, lease_id: int) -> None:
        """Takes a slot for a lease.

        Without a free slot its progress is not recorded: after a fault its KV is computed again.
        """
        free = next((slot for slot in range(self._num_slots) if slot not in self._slots.values()), None)
        if free is not None:
            self._slots[lease_id] = free
            word = free * self._slot_bytes // 8
            self._words[word + _COUNT], self._words[word + _FLAGS] = 0, _IS_BATCHED
            self._seconds[word + _REMAINING], self._seconds[word + _SERVED] = math.nan, 0.0
            self._words[word + _LEASE] = lease_id

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
        self._words[at // 8 + _COUNT] = first_block + len(data) // HASH_BYTES

    def report(self, lease_id: int, progress: SequenceProgress) -> None:
        """Reports the state of a sequence. A lease without a slot is ignored."""
        if (slot := self._slots.get(lease_id)) is None:
            return
        word = slot * self._slot_bytes // 8
        flags = _IS_BATCHED * progress.is_batched | _IS_PROTECTED * progress.is_protected
        self._words[word + _FLAGS] = flags | progress.num_preemptions << _PREEMPTIONS_SHIFT
        self._seconds[word + _SERVED] = progress.served_s
        self._seconds[word + _REMAINING] = math.nan if progress.decode_s is None else progress.decode_s

    def end(self, lease_id: int) -> None:
        """Frees the slot of a lease. To be called before the lease's blocks are freed."""
        slot = self._slots.pop(lease_id, None)
        if slot is not None:
            self._words[slot * self._slot_bytes // 8 + _LEASE] = 0

    def read(self) -> dict[int, tuple[bytes, ...]]:
        """Lease id → hashes of its computed blocks, for every lease that has a slot."""
        found = {}
        for slot in range(self._num_slots):
            at = slot * self._slot_bytes
            lease_id, count = self._words[at // 8 + _LEASE], self._words[at // 8 + _COUNT]
            if lease_id:
                first = at + 8 * _HEADER_WORDS
                starts = range(first, first + HASH_BYTES * min(count, self._max_blocks), HASH_BYTES)
                found[lease_id] = tuple(self._map[start : start + HASH_BYTES] for start in starts)
        return found

    def reports(self) -> dict[int, SequenceProgress]:
        """Lease id → its sequence's progress, for every lease that has a slot."""
        found = {}
        for word in range(0, self._num_slots * self._slot_bytes // 8, self._slot_bytes // 8):
            if lease_id := self._words[word + _LEASE]:
                decode_s, served_s = self._seconds[word + _REMAINING], self._seconds[word + _SERVED]
                flags = self._words[word + _FLAGS]
                found[lease_id] = SequenceProgress(
                    is_batched=bool(flags & _IS_BATCHED),
                    decode_s=None if math.isnan(decode_s) else decode_s,
                    served_s=served_s,
                    is_protected=bool(flags & _IS_PROTECTED),
                    num_preemptions=flags >> _PREEMPTIONS_SHIFT,
                )
        return found

    def close(self) -> None:
        self._words.release()
        self._seconds.release()
        self._map.close()


def page_bytes(num_slots: int, max_blocks: int) -> int:
    """Size of a page in bytes."""
    return num_slots * (8 * _HEADER_WORDS + HASH_BYTES * max_blocks)


def new_progress_fd(num_slots: int, max_blocks: int) -> int:
    """Returns a new memfd for a page. The caller closes it."""
    return new_memfd("muxmesh-progress", page_bytes(num_slots, max_blocks))
