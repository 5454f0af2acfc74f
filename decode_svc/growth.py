"""Takes more token blocks for an answer before it needs them, so that no decode step waits for a call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from decode_svc.room import AHEAD_TOKENS, ask_again_below, blocks_to_ask
from kvstore.client.worker import WorkerParts
from muxmesh.errors import MeshError, Overloaded
from muxmesh.types import EngineRequest, Lease, blocks_for


class Growth:
    """The token blocks of one lease, in order. Invariant: at most one call for more is under way."""

    def __init__(
        self,
        parts: WorkerParts,
        lease: Lease,
        request: EngineRequest,
        on_full: Callable[[], None],
        on_error: Callable[[MeshError], None],
    ) -> None:
        """``on_full``: there are no more blocks, and the answer cannot go on without one."""
        self.block_ids = lease.block_ids
        self._engine = parts.engine
        self._leases = parts.leases
        self._ref = lease.ref
        self._block_size = parts.block_size
        self._num_prompt_tokens = len(request.prompt_token_ids)
        self._most_blocks = blocks_for(request.most_tokens, parts.block_size)
        self._on_full, self._on_error = on_full, on_error
        self._call: asyncio.Task[None] | None = None
        self._ask_below = AHEAD_TOKENS
        self._num_tokens = self._num_prompt_tokens

    def watch(self, num_output_tokens: int) -> None:
        """The answer has so many tokens now."""
        self._num_tokens = self._num_prompt_tokens + num_output_tokens
        if self._room < self._ask_below and len(self.block_ids) < self._most_blocks and self._call is None:
            self._call = asyncio.create_task(self._grow(), name="lease growth")

    async def stop(self) -> None:
        """Waits for the call under way: what it brings belongs to the lease."""
        if self._call is not None:
            await asyncio.gather(self._call, return_exceptions=True)

    def moved(self, block_ids: tuple[int, ...]) -> None:
        """The lease has these blocks now."""
        self.block_ids = block_ids
        self._ask_below = AHEAD_TOKENS

    @property
    def _room(self) -> int:
        """Tokens that the blocks still hold."""
        return len(self.block_ids) * self._block_size - self._num_tokens

    async def _grow(self) -> None:
        wanted = blocks_to_ask(len(self.block_ids), self._most_blocks, self._block_size)
        try:
            block_ids = await self._as_many_as_there_are(wanted)
        except MeshError as error:
            self._on_error(error)
            return
        self._call = None
        if block_ids:
            self.block_ids += block_ids
            self._ask_below = AHEAD_TOKENS
            self._engine.extend(self._ref.lease_id, block_ids)
        elif self._room > 0:
            self._ask_below = ask_again_below(self._room)
        else:
            self._on_full()

    async def _as_many_as_there_are(self, wanted: int) -> tuple[int, ...]:
        """``wanted`` blocks, or half as many, and so on; none if there is not even one."""
        while wanted:
            try:
                return await self._leases.grow(self._ref, wanted)
            except Overloaded:
                wanted //= 2
        return ()
