"""The runner of the sim engine: deterministic tokens at the speed of a profile. Touches no KV and needs no weights."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence

from muxmesh.config.model_config import ModelConfig, SimProfile
from muxmesh.engine.step import Chunk, SampledToken, SampleSpec, Step, StepOutcome
from muxmesh.step_cost import StepCost, at_share
from muxmesh.types import Role


def sim_step_cost(profile: SimProfile) -> StepCost:
    """Returns the profile as a step cost on the whole device."""
    return StepCost(profile.base_s, profile.per_token_s, profile.per_context_s)


def sim_worker_cost(config: ModelConfig, role: Role) -> StepCost:
    """Returns the step cost of a worker of a sim model, on its share of the device."""
    return at_share(sim_step_cost(config.sim), config.compute_share.of(role) / 100, config.sim.scaling_of(role))


class SimRunner:
    """A `Runner` that derives each token, and the end of an output, from the last token, the output index and the seed.

    So a job that continues a sequence samples the same tokens as the uninterrupted one. Greedy sampling has no seed:
    outputs with the same token at the same index are equal from there on.
    """

    def __init__(
        self,
        profile: SimProfile,
        token_ids: Sequence[int],
        eos_token_id: int,
        sleep: Callable[[float], None] = time.sleep,
        max_steps: int = 1,
        cost: StepCost | None = None,
    ) -> None:
        """``token_ids``: the tokens that are sampled, unless the request allows others. ``sleep``: takes seconds.

        ``cost``: step times of the worker; None: those of the profile, on the whole device.
        """
        self.max_steps = max_steps
        self._profile = profile
        self._cost = cost or sim_step_cost(profile)
        self._token_ids = token_ids
        self._eos_token_id = eos_token_id
        self._sleep = sleep

    def load(self) -> None: ...

    def unload(self, drop_weights: bool) -> None: ...

    def run(self, step: Step, may_continue: Callable[[], bool] = lambda: True) -> StepOutcome:
        sampled = {chunk.job_id: [token] for chunk, token in self._compute(step)}
        num_steps = 1
        while num_steps < step.num_steps and may_continue():
            step = Step(
                tuple(chunk.following(sampled[chunk.job_id][-1].token_id) for chunk in step.chunks), step.num_steps
            )
            for chunk, token in self._compute(step):
                sampled[chunk.job_id].append(token)
            num_steps += 1
        return StepOutcome({job_id: tuple(tokens) for job_id, tokens in sampled.items()}, num_steps=num_steps)

    def _compute(self, step: Step) -> list[tuple[Chunk, SampledToken]]:
        """Takes the time of one step. Returns the token after each chunk that has a `SampleSpec`."""
        shape = step.shape
        duration_s = self._cost.step_s(shape.num_tokens, shape.num_context)
        if duration_s > 0:
            self._sleep(duration_s)
        return [(chunk, SampledToken(self._sample(chunk, chunk.sample))) for chunk in step.chunks if chunk.sample]

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
    allowed, bitmask = spec.sampling.allowed_token_ids, spec.token_bitmask
    if token in spec.banned or (allowed is not None and token not in allowed):
        return False
    return bitmask is None or bool(bitmask[token // 32] >> (token % 32) & 1)
