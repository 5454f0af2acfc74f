"""Fairness between tenants in virtual time, with `order.fairness` on and off: `python -m benchmarks.fairness`.

One model with 16 slots and steps of 10 ms, served by the mesh's own unit, queue and choice of batches.
Each row is a load of two tenants: Jain's index of their output tokens while both have requests, by weight; the largest
distance of their services in seconds of the device; and for how many steps a small request of another tenant waits.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.report import Report
from loadtest.record import Record
from muxmesh.config.schema import MeshConfig
from muxmesh.fairness import Fairness
from muxmesh.models.model_spec import SIM_SPEC
from muxmesh.scheduling_policy import SchedulingPolicy
from muxmesh.types import LengthPrediction, SchedulingState
from simulator.simulated_request import SimulatedRequest
from simulator.simulated_unit import SimulatedUnit
from simulator.timeline import Timeline

SLOTS, STEP_S, PROMPT_TOKENS = 16, 0.01, 20
RUN_S, SMALL_AT_S, SMALL_TOKENS = 70.0, 10.0, 20
POLICY = SchedulingPolicy("srtf-aged", 100.0, 1e9, 0.5)


@dataclass(frozen=True)
class Load:
    """Requests of one tenant that come every ``every_s`` seconds from the start on, ``number`` at once."""

    tenant: str
    number: int
    every_s: float
    num_output: int
    priority: int = 0
    weight: float = 1.0


LOADS: Mapping[str, tuple[Load, Load]] = {
    "10 times as many requests": (Load("a", 40, 0.5, 50), Load("b", 4, 0.5, 120)),
    "flood of the best class": (Load("a", 20, 0.5, 50, priority=-5), Load("b", 5, 0.5, 100)),
    "64 outputs for each request": (Load("a", 64, 1.0, 100), Load("b", 10, 0.5, 50)),
    "short against long outputs": (Load("a", 30, 0.5, 20), Load("b", 2, 0.5, 500)),
    "weights of 2 and 1": (Load("a", 15, 0.5, 50, weight=2.0), Load("b", 15, 0.5, 50)),
}


@dataclass(frozen=True)
class Outcome:
    """See the head of this module."""

    jain: float
    distance_s: float
    delay_steps: float


def simulate(loads: tuple[Load, Load], fairness: Fairness | None) -> Outcome:
    """Runs the loads of two tenants for a minute, and one small request of a third."""
    timeline, model = Timeline(), {"name": "m", "engine": "sim", "max_num_seqs": SLOTS, "sim": {"base_s": STEP_S}}
    config = MeshConfig.model_validate({"units": [{"kv_pool": "2GiB", "models": [model | {"max_model_len": 4096}]}]})
    unit = SimulatedUnit(timeline, config.units[0], {"m": SIM_SPEC}, POLICY, fairness=fairness)

    def send(load: Load) -> SimulatedRequest:
        state = SchedulingState(load.priority, timeline.now_s, 0.0, (load.num_output - 1) * STEP_S)
        length = LengthPrediction(load.num_output, load.num_output)
        request = SimulatedRequest(
            0, "m", PROMPT_TOKENS, load.num_output, load.num_output, state, length, Record(0, timeline.now_s),
            lambda _: None, tenant=load.tenant, tenant_weight=load.weight,
        )  # fmt: skip
        unit.enqueue(request)
        return request

    def send_all(load: Load) -> None:
        for _ in range(load.number):
            send(load)
        timeline.at(timeline.now_s + load.every_s, lambda: send_all(load))

    for load in loads:
        timeline.at(0.0, lambda load=load: send_all(load))  # type: ignore[misc]
    timeline.run(SMALL_AT_S)
    before = unit.count_tokens()
    small = send(Load("small", 1, 0.0, SMALL_TOKENS))
    distance_s = 0.0
    weights = {load.tenant: load.weight for load in loads}
    served = dict.fromkeys(weights, 0.0)
    while timeline.now_s < RUN_S:
        timeline.run(timeline.now_s + 0.5)
        tokens = unit.count_tokens()
        served = {name: (tokens[name] - before[name]) / weight for name, weight in weights.items()}
        distance_s = max(distance_s, (max(served.values()) - min(served.values())) * STEP_S / SLOTS)
    square = sum(value**2 for value in served.values())
    started_s = small.record.pieces[0][0] if small.record.pieces else timeline.now_s
    return Outcome(sum(served.values()) ** 2 / (2 * square), distance_s, (started_s - SMALL_AT_S) / STEP_S)


def main() -> int:
    """Prints the table."""
    report = Report("fairness")
    row = "{:28} {:>10} {:>10} {:>12} {:>10} {:>12} {:>10}"
    print(row.format("", "Jain off", "Jain on", "apart off s", "on s", "delay off", "on steps"))
    for name, loads in LOADS.items():
        off, on = (simulate(loads, fairness) for fairness in (None, Fairness()))
        numbers = (off.jain, on.jain, off.distance_s, on.distance_s, off.delay_steps, on.delay_steps)
        print(row.format(name, *(f"{number:.3f}" for number in numbers)))
        report.bar(f"{name}: Jain index", on.jain, ">= 0.99", ok=on.jain >= 0.99)
        report.bar(f"{name}: start of a small request, steps", on.delay_steps, "<= 3", ok=on.delay_steps <= 3)
    print()
    print(report.table())
    return 0 if all(bar["ok"] for bar in report.bars) else 1


if __name__ == "__main__":
    sys.exit(main())
