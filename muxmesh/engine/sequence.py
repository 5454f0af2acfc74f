"""The record of one sequence in a worker: its tokens, how many of them are computed, and its token blocks. Pure.

    token_ids     [ prompt | resumed | sampled here ........... ]
    KV computed   [ 0 ............ num_computed_tokens )
    token blocks  [ 0 .................................... len(block_ids) * block_size )

An engine schedules from the record; the worker allocates, swaps and publishes blocks by it. Neither keeps a copy of
any part of it. The record knows no lease and touches no KV.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from muxmesh.batch_choice import is_protected
from muxmesh.block_hashes import BlockHashChain
from muxmesh.errors import InvalidRequest
from muxmesh.remaining_work import RemainingWork
from muxmesh.types import EngineRequest, Finish, SchedulingState, blocks_for


class SequenceRecord:
    """Owns the state of one sequence while a worker has its lease.

    The engine that runs the sequence calls `advance` and `extend`; the worker that has the lease changes its blocks.
    Both do so on one event loop.

    Invariant: ``0 <= num_computed_tokens <= num_tokens``. The KV of every computed token is in ``block_ids``, or the
    sequence is swapped out and ``block_ids`` is empty. The hash chain covers computed tokens only.
    """

    def __init__(
        self,
        request: EngineRequest,
        block_size: int,
        kv_root: bytes,
        block_ids: tuple[int, ...],
        num_computed_tokens: int = 0,
        sampled_token_ids: Sequence[int] = (),
    ) -> None:
        """``sampled_token_ids`` follow the resumed ones. ``kv_root``: see `KvIdentity.root`.

        Raises ValueError if no token is left to compute, or the blocks do not hold the known tokens.
        """
        self.request = request
        self.work = RemainingWork(
            request.scheduling,
            request.prediction,
            len(request.resume_token_ids),
            request.stopping.max_new_tokens,
        )
        """Updated with each output token."""
        self.slack_s = math.inf
        """Seconds until its next token is due by its SLO, as its engine noted last; see `muxmesh.slo.slack_s`."""
        self.num_preemptions = request.scheduling.num_preemptions
        """How often it was displaced from a batch, in earlier attempts too."""
        self.block_size = block_size
        self.block_ids = block_ids
        self.finish: Finish | None = None
        self.computing_s = 0.0
        """Seconds of the steps that computed tokens of the sequence, in this engine."""
        self.token_bitmask: np.ndarray | None = None
        """The tokens that may be sampled next: uint32, bit i of word w is token ``32 * w + i``. None allows all."""
        self._token_ids = [*request.prompt_token_ids, *request.resume_token_ids, *sampled_token_ids]
        self._num_computed_tokens = num_computed_tokens
        self._chain = BlockHashChain(block_size, kv_root)
        self._num_hashed_tokens = 0
        self._is_exact = True
        self.work.update(self.num_output_tokens)
        if not 0 <= num_computed_tokens < len(self._token_ids):
            raise ValueError(f"{num_computed_tokens} of {len(self._token_ids)} tokens are computed")
        if self.num_free_slots < 0:
            needed = blocks_for(len(self._token_ids), block_size)
            raise ValueError(f"{len(block_ids)} token blocks, needs {needed}")

    @property
    def is_protected(self) -> bool:
        """Whether others of its class do not displace it from the batch."""
        return is_protected(self.work, self.slack_s)

    @property
    def scheduling(self) -> SchedulingState:
        """What the sequence is ordered by: its remaining work of now, or of a few tokens ago."""
        return self.work.state

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and output."""
        return len(self._token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens, resumed ones included."""
        return len(self._token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose KV is computed."""
        return self._num_computed_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens whose KV is not computed."""
        return len(self._token_ids) - self._num_computed_tokens

    @property
    def num_free_slots(self) -> int:
        """Tokens that the blocks can hold beyond the known ones; negative if the last known token has no slot."""
        return len(self.block_ids) * self.block_size - len(self._token_ids)

    @property
    def max_blocks(self) -> int:
        """Token blocks of the longest possible sequence."""
        return blocks_for(self.request.max_tokens, self.block_size)

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Returns the token ids at positions [start, end)."""
        return tuple(self._token_ids[start:end])

    @property
    def output_token_ids(self) -> tuple[int, ...]:
        """All output tokens, resumed ones included."""
        return self.tokens(len(self.request.prompt_token_ids), len(self._token_ids))

    def advance(self, num_tokens: int, step_s: float = 0.0) -> None:
        """Records that the KV of the next ``num_tokens`` tokens is computed, by a step of ``step_s`` seconds."""
        assert num_tokens <= self.num_uncomputed_tokens, "only known tokens are computed"
        self._num_computed_tokens += num_tokens
        self.computing_s += step_s

    def check_token_ids(self, vocab_size: int) -> None:
        """Raises InvalidRequest if any token id of the sequence or of its request is not in [0, vocab_size)."""
        request = self.request
        for field, token_ids in (
            ("token_ids", self._token_ids),
            ("sampling.logit_bias", [token_id for token_id, _ in request.sampling.logit_bias]),
            ("sampling.allowed_token_ids", request.sampling.allowed_token_ids),
            ("stopping.stop_token_ids", request.stopping.stop_token_ids),
            ("stopping.eos_token_ids", request.stopping.eos_token_ids),
        ):
            if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
                unknown = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
                raise InvalidRequest(field, f"token id {unknown} is unknown; the model has {vocab_size} tokens")

    def extend(self, token_ids: Sequence[int]) -> Finish | None:
        """Appends sampled tokens up to the one that finishes the sequence, and drops those after it.

        Returns the finish, or None; no other code decides that.
        """
        assert self.finish is None, "a finished sequence does not grow"
        finish_after, num_output_tokens = self.request.stopping.finish_after, self.num_output_tokens
        for num_kept, token_id in enumerate(token_ids, 1):
            if (finish := finish_after(token_id, num_output_tokens + num_kept)) is not None:
                self.finish = finish
                token_ids = token_ids[:num_kept]
                break
        self._token_ids += token_ids
        self.work.update(self.num_output_tokens)
        return self.finish

    def add_blocks(self, block_ids: tuple[int, ...]) -> None:
        self.block_ids += block_ids

    def swap_out(self) -> None:
        """Records that the KV is copied to the swap region and the token blocks are freed."""
        self.block_ids = ()

    def swap_in(self, block_ids: tuple[int, ...], is_exact: bool) -> None:
        """Records that the KV is in these token blocks. If its copy was not exact, it is never shared from then on."""
        assert not self.block_ids, "only a sequence that is swapped out is swapped in"
        self.block_ids = block_ids
        self._is_exact = self._is_exact and is_exact

    @property
    def num_hashable_blocks(self) -> int:
        """Full blocks of computed tokens, in the pool or swapped out; 0 if their KV is not exact."""
        return self._num_computed_tokens // self.block_size if self._is_exact else 0

    @property
    def num_shareable_blocks(self) -> int:
        """Full blocks of computed tokens that are in the pool, so that other sequences may use them."""
        return self.num_hashable_blocks if self.block_ids else 0

    def block_hashes(self, first_block: int, end_block: int) -> tuple[bytes, ...]:
        """Returns the hashes of the blocks [first_block, end_block). ``end_block`` is at most `num_hashable_blocks`."""
        assert end_block <= self.num_hashable_blocks, "only full blocks of computed tokens have a hash"
        self._chain.extend(self._token_ids[self._num_hashed_tokens : self._num_computed_tokens])
        self._num_hashed_tokens = self._num_computed_tokens
        return tuple(self._chain.hashes[first_block:end_block])

    def check_integrity(self) -> None:
        """Proves the invariant. Raises AssertionError."""
        computed = self._num_computed_tokens
        assert 0 <= computed <= len(self._token_ids), "more tokens are computed than known"
        assert not self.block_ids or computed <= len(self.block_ids) * self.block_size, "computed tokens have no block"
        assert self._num_hashed_tokens <= computed, "tokens are hashed that are not computed"
        assert len(self._chain.hashes) == self._num_hashed_tokens // self.block_size, "the hash chain has a gap"
