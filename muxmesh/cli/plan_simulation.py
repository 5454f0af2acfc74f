"""Plans judged by the simulator: the mesh's own admission, arbiter and quotas in virtual time, with profiled times.

Knows how a plan becomes a configuration of the simulator. The search knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random

from loadtest.record import Record
from loadtest.workload import Body, Sketch
from muxmesh.cli.plan_inputs import PlanInputs
from muxmesh.config.load import parse_mesh_config
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import MeshConfig
from muxmesh.models.model_spec import DTYPE_BYTES, SIM_SPEC, ModelSpec
from muxmesh.placement.corrected_estimator import CorrectedEstimator
from muxmesh.placement.mesh_writer import mesh_yaml
from muxmesh.placement.plan import ModelLoad, Plan, weighted_mean
from simulator.forecasts import TrueLengths
from simulator.measured_times import MeasuredStepTimes
from simulator.run import simulate
from simulator.step_times import StepTimes, linear_slowdown

_LONGEST = 8
"""Prompts and outputs are at most this multiple of the mean."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """What a plan served in virtual time."""

    throughput: float
    """Rate-weighted mean of completed requests per second, until each model's last request ended."""
    attainment: float
    """Share of the requests within `slo_scale` times their unloaded latency; that scale is 8 for an SLO in seconds."""


class PlanSimulation:
    """Simulates plans over the same requests: Poisson arrivals for ``seconds``, exponential lengths."""

    def __init__(self, inputs: PlanInputs, corrected: CorrectedEstimator, seconds: float, seed: int = 0) -> None:
        self._inputs = inputs
        self._corrected = corrected
        self._requests = _requests(inputs, seconds, seed)
        self._fitted: dict[tuple[str, int], StepTimes] = {}
        """By kind and number of devices."""

    def run(self, plan: Plan) -> Simulated:
        config = _config(mesh_yaml(plan, self._corrected, self._inputs.target, ()))
        loads = {load.name: load for load in self._inputs.loads}
        specs = {name: self._spec(model, loads[name]) for name, model in config.models().items()}
        result = simulate(
            config,
            specs,
            self._requests,
            TrueLengths(),
            slowdown=linear_slowdown(self._inputs.profile.contention),
            times=self._times(plan, config, loads),
        )
        return self._judged(loads, result.run.records)

    def _spec(self, model: ModelConfig, load: ModelLoad) -> ModelSpec:
        """A spec with the KV of the profile."""
        kv_bytes = self._inputs.profile.models[load.kind].kv_bytes_per_token
        head_dim = max(1, round(kv_bytes / (2 * DTYPE_BYTES[model.kv_dtype])))
        return replace(SIM_SPEC, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=head_dim, context_len=1 << 20)

    def _times(
        self, plan: Plan, config: MeshConfig, loads: Mapping[str, ModelLoad]
    ) -> dict[tuple[str, str], StepTimes]:
        """Step times by unit and model; a table is fitted once for all models and plans that use it."""
        sizes = {model.load.name: unit.num_devices for unit in plan.units for model in unit.models}
        found: dict[tuple[str, str], StepTimes] = {}
        for unit, model in config.placements():
            key = loads[model.name].kind, sizes[model.name]
            if key not in self._fitted:
                self._fitted[key] = MeasuredStepTimes.of(self._inputs.profile.models[key[0]], key[1])
            found[unit.name, model.name] = self._fitted[key]
        return found

    def _judged(self, loads: Mapping[str, ModelLoad], records: list[Record]) -> Simulated:
        within, throughputs = 0, list[tuple[ModelLoad, float]]()
        for name, load in loads.items():
            own = [one for one in records if one.model == name]
            done = [one for one in own if one.is_ok]
            last_s = max((one.ended_s or 0.0 for one in done), default=1.0)
            throughputs.append((load, len(done) / max(last_s, 1e-9)))
            for one in done:
                alone = replace(load, prompt_tokens=max(1, one.num_input), output_tokens=max(2, one.num_output))
                within += one.e2el_s <= load.slo_scale * self._corrected.idle_latency_s(alone)
        return Simulated(weighted_mean(throughputs), within / max(1, len(records)))


def _config(text: str) -> MeshConfig:
    """The configuration of a plan for the simulator, with a queue that no request finds full."""
    config = parse_mesh_config(text, "plan").config
    router = config.router.model_copy(update={"max_waiting_requests": 1_000_000})
    return config.model_copy(update={"router": router})


def _requests(inputs: PlanInputs, seconds: float, seed: int) -> list[Sketch]:
    """All requests in order of arrival."""
    sampled: list[tuple[float, str, int, int]] = []
    for load in inputs.loads:
        random = Random(f"{seed} {load.name}")
        at_s = random.expovariate(load.rate)
        while at_s < seconds:
            prompt, output = (_length(random, mean) for mean in (load.prompt_tokens, load.output_tokens))
            sampled.append((at_s, load.name, prompt, output))
            at_s += random.expovariate(load.rate)
    return [
        Sketch(index, at_s, Body(None, prompt, output), output, True, index, name, None, 0)
        for index, (at_s, name, prompt, output) in enumerate(sorted(sampled))
    ]


def _length(random: Random, mean: float) -> int:
    return max(1, round(min(_LONGEST * mean, random.expovariate(1 / mean))))
