"""Small meshes of sim engines and workloads for the simulator."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

from loadtest.workload import Body, Sketch
from muxmesh.config.schema import MeshConfig
from muxmesh.models.model_spec import SIM_SPEC
from simulator.forecasts import Forecasts, TrueLengths
from simulator.run import SimulationResult, simulate

STEP_S = 0.01


def sim_model(name: str = "m", slots: int = 4, **fields: Any) -> dict[str, Any]:
    """A model whose steps take 10 ms, with 128 prompt tokens in a step."""
    model = {"name": name, "engine": "sim", "max_num_seqs": slots, "max_model_len": 4096, "sim": {"base_s": STEP_S}}
    return model | fields


def sim_mesh(
    *models: dict[str, Any],
    policy: str = "fcfs",
    pool: str = "64MiB",
    slab: str | None = None,
    num_units: int = 1,
    **fields: Any,
) -> MeshConfig:
    """A mesh whose units all serve ``models``, by default one. ``fields``: further ones of the units."""
    unit: dict[str, Any] = {"kv_pool": pool, "models": list(models or [sim_model()])} | fields
    if slab is not None:
        unit["slab"] = slab
    units = [unit | {"name": f"unit{index}"} for index in range(num_units)]
    return MeshConfig.model_validate({"order": {"policy": policy}, "units": units})


def make_sketch(index: int, at_s: float, num_input: int = 10, num_output: int = 10, **fields: Any) -> Sketch:
    """A request with a random prompt and a forced output length."""
    body = fields.pop("body", Body(None, num_input, num_output))
    given = {"max_new_tokens": num_output, "is_forced": True, "seed": 0, "model": None, "tenant": None, "priority": 0}
    return Sketch(index=index, at_s=at_s, body=body, **given | fields)


def random_sketches(count: int, rate: float, seed: int = 0) -> list[Sketch]:
    """Poisson arrivals of prompts of up to 300 tokens and outputs of up to 80."""
    rng = random.Random(seed)
    times = itertools.accumulate(rng.expovariate(rate) for _ in range(count))
    return [make_sketch(index, at_s, rng.randint(1, 300), rng.randint(1, 80)) for index, at_s in enumerate(times)]


def run_simulation(
    sketches: Sequence[Sketch], config: MeshConfig | None = None, forecasts: Forecasts | None = None, **options: Any
) -> SimulationResult:
    """Simulates, by default one model with four slots under fcfs and exact forecasts."""
    config = config or sim_mesh()
    specs = dict.fromkeys(config.models(), SIM_SPEC)
    return simulate(config, specs, sketches, forecasts or TrueLengths(), **options)
