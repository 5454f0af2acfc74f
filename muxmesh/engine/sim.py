"""The sim runner: deterministic tokens at the speed of a profile. Touches no KV and needs no weights."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence

from muxmesh.config.schema import SimProfile
from muxmesh.cost import StepCost
from muxmesh.engine.step import Chunk, Draw, Drawn, Step, StepOutcome


def step_time_s(profile: SimProfile, step: Step) -> float:
    """How long the step takes by the profile, in seconds."""
    return step_cost(profile).step_s(step.shape.num_tokens, step.shape.num_context)


def step_cost(profile: SimProfile) -> StepCost:
    """The profile as what steps cost."""
    return StepCost(profile.base_s, profile.per_token_s, profile.per_context_s)


class SimRunner:
    """A `Runner`. Each token, and where an answer ends, is a hash of the token before it, its place and the seed, so a
    resumed job goes on alike. Greedy answers have no seed: after the same token at the same place
    they go on alike.
    """

    def __init__(
        self,
        profile: SimProfile,
        token_ids: Sequence[int],
        eos_token_id: int,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._profile = profile
        self._token_ids = token_ids
        self._eos_token_id = eos_token_id
        self._sleep = sleep

    def load(self) -> None:
        """See `Runner`."""

    def run(self, step: Step) -> StepOutcome:
        """See `Runner`."""
        duration_s = step_time_s(self._profile, step)
        if duration_s > 0:
            self._sleep(duration_s)
        return StepOutcome(
            {chunk.job_id: Drawn(self._token(chunk, chunk.draw)) for chunk in step.chunks if chunk.draw is not None}
        )

    def _token(self, chunk: Chunk, draw: Draw) -> int:
        index, sampling = draw.output_index, draw.sampling
        seed = 0 if sampling.greedy else sampling.seed
        digest = zlib.crc32(f"{chunk.token_ids[-1]}:{index}:{seed}".encode())
        if self._ends(index, digest) and self._eos_token_id not in draw.banned:
            return self._eos_token_id
        allowed: Sequence[int] = sampling.allowed_token_ids or self._token_ids
        if draw.banned:
            allowed = [token for token in allowed if token not in draw.banned]
            allowed = allowed or [token for token in range(256) if token not in draw.banned]
        return allowed[digest % len(allowed)]

    def _ends(self, index: int, digest: int) -> bool:
        mean = self._profile.output_tokens
        if self._profile.output_lengths == "geometric":
            return digest // len(self._token_ids) % mean == 0  # not what chooses the token
        return 0 < mean <= index + 1
