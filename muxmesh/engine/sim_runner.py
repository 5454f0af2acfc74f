"""The sim runner: deterministic tokens at the speed of a profile. Touches no KV and needs no weights."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence

from muxmesh.config.schema import SimProfile
from muxmesh.engine.step import Chunk, SampledToken, SampleSpec, Step, StepOutcome
from muxmesh.step_cost import StepCost


def sim_step_cost(profile: SimProfile) -> StepCost:
    """The profile as a step cost."""
    return StepCost(profile.base_s, profile.per_token_s, profile.per_context_s)


class SimRunner:
    """A `Runner`. Each token, and where an output ends, is a hash of the token before it, its index and the seed, so a
    resumed job continues alike. Greedy outputs have no seed: after the same token at the same index they continue
    alike.
    """

    def __init__(
        self,
        profile: SimProfile,
        token_ids: Sequence[int],
        eos_token_id: int,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """``token_ids``: those that outputs consist of."""
        self._profile = profile
        self._cost = sim_step_cost(profile)
        self._token_ids = token_ids
        self._eos_token_id = eos_token_id
        self._sleep = sleep

    def load(self) -> None:
        """See `Runner`."""

    def run(self, step: Step) -> StepOutcome:
        """See `Runner`."""
        shape = step.shape
        duration_s = self._cost.step_s(shape.num_tokens, shape.num_context)
        if duration_s > 0:
            self._sleep(duration_s)
        return StepOutcome(
            {chunk.job_id: SampledToken(self._sample(chunk, chunk.sample)) for chunk in step.chunks if chunk.sample}
        )

    def _sample(self, chunk: Chunk, spec: SampleSpec) -> int:
        index, sampling = spec.output_index, spec.sampling
        seed = 0 if sampling.greedy else sampling.seed
        digest = zlib.crc32(f"{chunk.token_ids[-1]}:{index}:{seed}".encode())
        if self._ends(index, digest) and _may_sample(spec, self._eos_token_id):
            return self._eos_token_id
        allowed: Sequence[int] = sampling.allowed_token_ids or self._token_ids
        if spec.banned or spec.token_bitmask is not None:
            allowed = [token for token in allowed if _may_sample(spec, token)]
            allowed = allowed or [token for token in range(256) if _may_sample(spec, token)]
        return allowed[digest % len(allowed)]

    def _ends(self, index: int, digest: int) -> bool:
        mean = self._profile.output_tokens
        if self._profile.output_lengths == "geometric":
            return digest // len(self._token_ids) % mean == 0  # independent of the choice of the token
        return 0 < mean <= index + 1


def _may_sample(spec: SampleSpec, token: int) -> bool:
    bitmask = spec.token_bitmask
    return token not in spec.banned and (bitmask is None or bool(bitmask[token // 32] >> (token % 32) & 1))
