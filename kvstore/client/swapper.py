"""Copies KV between the pool and the swap region, for the leases of one worker: one at a time, beside its compute."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from kvstore.client.attachment import Attachment
from kvstore.client.leases import LeaseClient
from kvstore.client.swap import SwapRegion
from kvstore.grant import Word
from muxmesh.clock import Clock
from muxmesh.engine.kv_codec import decode, encode, encoded_bytes
from muxmesh.engine.kv_view import KvView
from muxmesh.types import KvFormat, LeaseRef


class Swapper:
    """Owns the copies under way. kvstore decides what is where; this only carries it.

    Whoever calls may be cancelled at any moment: what a copy touches is free to be reused only after `quiesce`.
    """

    def __init__(
        self, attachment: Attachment, region: SwapRegion, view: KvView, leases: LeaseClient, clock: Clock
    ) -> None:
        self._page, self._slot = attachment.page, attachment.slot
        self._region = region
        self._view = view
        self._leases = leases
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv swap")
        self._copies: dict[int, tuple[tuple[int, ...], KvFormat]] = {}
        self._under_way: dict[int, asyncio.Future[None]] = {}

    async def copy_out(
        self, ref: LeaseRef, block_ids: Sequence[int], num_tokens: int, kv_format: KvFormat, computed: Sequence[bytes]
    ) -> None:
        """The lease's KV to the swap region; its token blocks then are others'. ``computed``: see `LeaseClient`.

        Raises Overloaded if there is no room, LeaseLost.
        """
        num_bytes = encoded_bytes(self._view.shape, num_tokens, kv_format)
        pages = await self._leases.swap_out(ref, num_bytes)
        sink = self._region.copy(pages)
        await self._copy(ref, lambda: encode(self._view, block_ids, num_tokens, kv_format, sink))
        self._page.add(self._slot, Word.SWAP_OUT_BYTES, num_bytes)
        self._copies[ref.lease_id] = pages, kv_format
        await self._leases.swapped_out(ref, computed)

    async def copy_in(self, ref: LeaseRef, block_ids: Sequence[int], num_tokens: int, num_cached: int) -> None:
        """The lease's KV back to the pool; its swap pages then are others'.

        The first ``num_cached`` of the blocks hold theirs already. Raises LeaseLost.
        """
        pages, kv_format = self._copies[ref.lease_id]
        source = self._region.copy(pages)
        await self._copy(ref, lambda: decode(self._view, block_ids, num_tokens, kv_format, source, num_cached))
        skipped = num_cached * self._view.shape.token_block_bytes if kv_format == "raw" else 0
        num_bytes = encoded_bytes(self._view.shape, num_tokens, kv_format) - skipped
        self._page.add(self._slot, Word.SWAP_IN_BYTES, num_bytes)
        await self._leases.swapped_in(ref)
        del self._copies[ref.lease_id]

    async def quiesce(self, lease_id: int) -> None:
        """Returns when nothing of the lease is copied any more; what was copied is forgotten."""
        if copy := self._under_way.get(lease_id):
            await asyncio.wait([copy])
        self._copies.pop(lease_id, None)

    def close(self) -> None:
        """Waits for the copy under way."""
        self._thread.shutdown()

    async def _copy(self, ref: LeaseRef, work: Callable[[], None]) -> None:
        copy = asyncio.get_running_loop().run_in_executor(self._thread, self._timed, work)
        self._under_way[ref.lease_id] = copy
        copy.add_done_callback(lambda _: self._under_way.pop(ref.lease_id))
        await asyncio.shield(copy)

    def _timed(self, work: Callable[[], None]) -> None:
        started_s = self._clock.monotonic_s()
        work()
        self._page.add(self._slot, Word.SWAP_NS, int((self._clock.monotonic_s() - started_s) * 1e9))
