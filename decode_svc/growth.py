"""Takes more token blocks for an answer before it needs them, so that no decode step waits for a call."""

from __future__ import annotations

import asyncio

from kvstore.client.leases import LeaseClient
from muxmesh.engine.api import Engine
from muxmesh.errors import MeshError, Overloaded, RequestAborted
from muxmesh.types import EngineRequest, Lease, blocks_for

AHEAD_TOKENS = 64
"""More is asked for when the blocks have room for fewer tokens than this."""
GROWTH_TOKENS = 128
"""How much is asked for at a time; if the pool has not so much, half of it, and so on down to one block."""


class Growth:
    """The growth of one lease. Invariant: at most one call is under way."""

    def __init__(
        self, engine: Engine, leases: LeaseClient, lease: Lease, request: EngineRequest, block_size: int
    ) -> None:
        self.failure: MeshError | None = None
        self._engine = engine
        self._leases = leases
        self._lease = lease
        self._job_id = lease.ref.lease_id
        self._num_blocks = len(lease.block_ids)
        self._num_prompt_tokens = len(request.prompt_token_ids)
        self._most_blocks = blocks_for(len(request.prompt_token_ids) + request.stopping.max_new_tokens, block_size)
        self._block_size = block_size
        self._call: asyncio.Task[None] | None = None
        self._ask_below = AHEAD_TOKENS
        self._num_tokens = self._num_prompt_tokens

    def watch(self, num_output_tokens: int) -> None:
        """The answer has so many tokens now."""
        self._num_tokens = self._num_prompt_tokens + num_output_tokens
        if self._room < self._ask_below and self._num_blocks < self._most_blocks and self._call is None:
            self._call = asyncio.create_task(self._grow(), name="lease growth")

    async def stop(self) -> None:
        """Waits for the call under way: what it brings belongs to the lease that is about to be released."""
        if self._call is not None:
            await asyncio.gather(self._call, return_exceptions=True)

    @property
    def _room(self) -> int:
        """Tokens that the blocks still hold."""
        return self._num_blocks * self._block_size - self._num_tokens

    async def _grow(self) -> None:
        wanted = min(blocks_for(GROWTH_TOKENS, self._block_size), self._most_blocks - self._num_blocks)
        try:
            block_ids = await self._as_many_as_there_are(wanted)
        except MeshError as error:
            self._give_up(error)
            return
        self._call = None
        if block_ids:
            self._num_blocks += len(block_ids)
            self._ask_below = AHEAD_TOKENS
            self._engine.extend(self._job_id, block_ids)
        elif self._room > 0:
            self._ask_below = -(-self._room // 2)  # somebody may end meanwhile
        else:
            self._give_up(RequestAborted("out of KV memory; the request goes on when there is room"))

    async def _as_many_as_there_are(self, wanted: int) -> tuple[int, ...]:
        """``wanted`` blocks, or half as many, and so on; none if there is not even one."""
        while wanted:
            try:
                return await self._leases.grow(self._lease.ref, wanted)
            except Overloaded:
                wanted //= 2
        return ()

    def _give_up(self, error: MeshError) -> None:
        self.failure = error
        self._engine.abandon(self._job_id, str(error))
