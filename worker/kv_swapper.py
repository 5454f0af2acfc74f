"""Copies KV between the pool and the swap region for one worker: one copy at a time, in a thread beside compute.

kvstore decides which lease is swapped and where its copy is; `DevicePool` does the copying.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from kvstore.grant_page import Word
from muxmesh.clock import Clock
from muxmesh.device.device_pool import KvCopy
from muxmesh.models.model_spec import KvShape
from muxmesh.sequence_states import SequenceState
from muxmesh.types import KvFormat, LeaseRef
from worker.attachment import Attachment
from worker.lease_client import LeaseClient
from worker.worker_metrics import SwapCount, WorkerCounters


class KvSwapper:
    """Owns the copies in progress, and the pages and format of the copy of each swapped lease.

    A copy continues when its caller is cancelled, so the memory of a lease may be reused only after `quiesce`.
    """

    def __init__(
        self,
        attachment: Attachment,
        shape: KvShape,
        leases: LeaseClient,
        clock: Clock,
        counters: WorkerCounters | None = None,
    ) -> None:
        self._pool = attachment.pool
        self._page, self._slot = attachment.page, attachment.slot
        self._shape = shape
        self._leases = leases
        self._clock = clock
        self._counters = counters or WorkerCounters()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv swap")
        self._copies: dict[int, KvCopy] = {}
        self._in_progress: dict[int, asyncio.Future[int]] = {}

    async def copy_out(self, ref: LeaseRef, block_ids: Sequence[int], num_tokens: int, kv_format: KvFormat) -> None:
        """Copies the KV of a lease's first ``num_tokens`` tokens to the swap region.

        Raises Overloaded if the region is full, and LeaseLost.
        """
        pages = await self._leases.begin_swap_out(ref, self._pool.copy_bytes(self._shape, num_tokens, kv_format))
        copy = KvCopy(num_tokens, kv_format, pages)
        self._enter(ref, SequenceState.SWAPPING_OUT)
        swap = self._counters.swaps["out", kv_format]
        num_bytes = await self._run(ref, swap, lambda: self._pool.copy_out(self._shape, block_ids, copy))
        self._page.add(self._slot, Word.SWAP_OUT_BYTES, num_bytes)
        self._copies[ref.lease_id] = copy
        self._enter(ref, SequenceState.SWAPPED)

    async def copy_in(self, ref: LeaseRef, block_ids: Sequence[int], num_cached_blocks: int) -> None:
        """Copies a swapped lease's KV to token blocks, except to the first ``num_cached_blocks``, which hold it."""
        copy = self._copies[ref.lease_id]
        self._enter(ref, SequenceState.SWAPPING_IN)
        swap = self._counters.swaps["in", copy.kv_format]
        num_bytes = await self._run(
            ref, swap, lambda: self._pool.copy_in(self._shape, block_ids, copy, num_cached_blocks)
        )
        self._page.add(self._slot, Word.SWAP_IN_BYTES, num_bytes)
        del self._copies[ref.lease_id]
        self._enter(ref, SequenceState.PAUSED)

    async def quiesce(self, lease_id: int) -> None:
        """Waits until no copy of the lease is in progress, and drops the record of its copy."""
        if copying := self._in_progress.get(lease_id):
            await asyncio.wait([copying])
        self._copies.pop(lease_id, None)

    def close(self) -> None:
        """Blocks until the copy in progress is done."""
        self._thread.shutdown()

    def _enter(self, ref: LeaseRef, state: SequenceState) -> None:
        self._counters.states.enter(ref.lease_id, state, self._clock.monotonic_s())

    async def _run(self, ref: LeaseRef, swap: SwapCount, copy: Callable[[], int]) -> int:
        copying = asyncio.get_running_loop().run_in_executor(self._thread, self._timed, swap, copy)
        self._in_progress[ref.lease_id] = copying
        copying.add_done_callback(lambda _: self._in_progress.pop(ref.lease_id))
        return await asyncio.shield(copying)

    def _timed(self, swap: SwapCount, copy: Callable[[], int]) -> int:
        """Copies in the one thread, which alone changes ``swap``."""
        started_at_s = self._clock.monotonic_s()
        num_bytes = copy()
        seconds = self._clock.monotonic_s() - started_at_s
        self._page.add(self._slot, Word.SWAP_NS, int(seconds * 1e9))
        swap.add(num_bytes, seconds)
        return num_bytes
