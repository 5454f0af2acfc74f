"""The latency of a request that has the device for itself, of which an SLO may be a multiple. Pure.

With ``engine: sim`` it is that of the profile, on the whole device. Otherwise it is computed from the step costs that
the workers measured (`UnloadedCosts`), at batch size 1: the prompt alone, in chunks of the step's token budget, and
decode steps of one sequence. A worker with a compute share measures its steps on that share, so the latency of a model
with a small share is larger. Prefix caching, queues and the network are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from muxmesh.config.model_config import ModelConfig
from muxmesh.engine.sim_runner import sim_step_cost
from muxmesh.step_cost import ModelCosts, StepCost

_SETTLING_FITS = 30
"""How many fits of a worker its unloaded cost follows at first. A worker fits its first steps and then every 16th, and
a unit reports once a second, so they take half a minute of steps or longer, and about 400 steps if these are slow.
"""
_SMALLER_BATCH = 0.8
"""Later it is replaced only by a fit of steps whose mean batch is this part of that before, or less."""
_LASTING_FITS = 8
"""How many fits in a row have to be of batches that small. The first fits of a worker that has restarted are of a few
steps, whose batches may be small by chance.
"""


class UnloadedCost:
    """Owns the step cost of one worker from which its model's unloaded latency is computed.

    An SLO must not become looser because the device is loaded, so the cost does not follow the fit for ever: it settles
    after `_SETTLING_FITS` fits. If the steps until then were those of large batches, from which a step of one sequence
    is extrapolated, later fits of smaller batches replace it, if there are `_LASTING_FITS` of them in a row. Each cost
    has a mean batch of at most 0.8 times that of the one before, so it changes at most 31 times more from 1024 on.
    """

    def __init__(self) -> None:
        self.cost: StepCost | None = None
        """None before the first fit."""
        self._last: StepCost | None = None
        self._num_fits = 0
        self._num_smaller = 0

    def observe(self, cost: StepCost) -> None:
        """Takes the cost that the worker reports now. The same cost again is the same fit."""
        if cost == self._last:
            return
        self._last = cost
        self._num_fits += 1
        is_smaller = self.cost is not None and cost.mean_seqs <= _SMALLER_BATCH * self.cost.mean_seqs
        self._num_smaller = self._num_smaller + 1 if is_smaller else 0
        if self._num_fits <= _SETTLING_FITS or self._num_smaller >= _LASTING_FITS:
            self.cost, self._num_smaller = cost, 0


class UnloadedCosts:
    """Owns the unloaded step costs of both workers of one model."""

    def __init__(self) -> None:
        self._prefill, self._decode = UnloadedCost(), UnloadedCost()

    def observe(self, costs: ModelCosts) -> None:
        """Takes the costs that the unit reports now."""
        self._prefill.observe(costs.prefill)
        self._decode.observe(costs.decode)

    @property
    def costs(self) -> ModelCosts | None:
        """None before the first report."""
        prefill, decode = self._prefill.cost, self._decode.cost
        return None if prefill is None or decode is None else ModelCosts(prefill, decode)


@dataclass(frozen=True, slots=True)
class Unloaded:
    """An `UnloadedLatency` from step costs. ``chunk``: prompt tokens in a step."""

    prefill: StepCost
    decode: StepCost
    chunk: int

    def ttft_s(self, num_prompt: int) -> float:
        return self.prefill.prefill_s(num_prompt, chunk=self.chunk)

    def tpot_s(self, num_prompt: int, num_output: int = 1) -> float:
        return self.decode.step_s(1, num_prompt + max(0, num_output - 1) / 2)

    def e2el_s(self, num_prompt: int, num_output: int) -> float:
        return self.ttft_s(num_prompt) + num_output * self.tpot_s(num_prompt, num_output)


def unloaded(model: ModelConfig, measured: ModelCosts | None) -> Unloaded | None:
    """The unloaded latency of ``model``; None if it has to be measured and ``measured`` is None."""
    if model.engine == "sim":
        cost = sim_step_cost(model.sim)
        return Unloaded(cost, cost, model.step_token_budget)
    return None if measured is None else Unloaded(measured.prefill, measured.decode, model.step_token_budget)
