"""What the requests of a simulated run are judged by: the step times of each model, and its SLO.

Knows no simulation in progress; `loadtest.report` does the judging.
"""

from __future__ import annotations

from collections.abc import Mapping

from loadtest.record import Run
from loadtest.slo import Objectives
from muxmesh.config.schema import MeshConfig
from simulator.step_times import LinearStepTimes, StepTimes, unloaded_latency


def objectives_of(config: MeshConfig, run: Run, times: Mapping[tuple[str, str], StepTimes] | None = None) -> Objectives:
    """The objectives of the models that ``run`` has requests for.

    ``times``: (unit, model) → step times, as for `simulator.run.simulate`. The unloaded latency of a model on several
    units is that on the first of them.
    """
    default = next(iter(config.models()))
    used = {record.model or default for record in run.records}
    latencies, slos = {}, {}
    for unit, model in config.placements():
        if model.name in used and model.name not in latencies:
            own = (times or {}).get((unit.name, model.name)) or LinearStepTimes.of(model.sim)
            latencies[model.name] = unloaded_latency(own, model.step_token_budget)
            if model.slo is not None:
                slos[model.name] = model.slo
    return Objectives(latencies, slos, default)
