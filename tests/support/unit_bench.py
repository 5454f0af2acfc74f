"""One simulated unit on a timeline, for tests."""

from __future__ import annotations

from typing import Any

from loadtest.record import Record
from muxmesh.config.schema import MeshConfig
from muxmesh.fairness import Fairness
from muxmesh.models.model_spec import SIM_SPEC
from muxmesh.scheduling_policy import FCFS, SchedulingPolicy
from muxmesh.types import LengthPrediction, SchedulingState
from simulator.simulated_request import SimulatedRequest
from simulator.simulated_unit import Decision, SimulatedUnit
from simulator.timeline import NO_DELAYS, Delays, Timeline
from tests.support.simulations import sim_mesh

TOKEN_BLOCK_BYTES = SIM_SPEC.kv_shape(16, "float32").token_block_bytes
TOKENS_PER_MIB = 2**20 // TOKEN_BLOCK_BYTES * 16


class Bench:
    """One unit on a timeline, with its decisions and the requests that have ended."""

    def __init__(
        self,
        config: MeshConfig | None = None,
        policy: SchedulingPolicy = FCFS,
        delays: Delays = NO_DELAYS,
        fairness: Fairness | None = None,
    ) -> None:
        config = config or sim_mesh()
        self.timeline = Timeline()
        self.decisions: list[Decision] = []
        specs = dict.fromkeys(config.models(), SIM_SPEC)
        self.unit = SimulatedUnit(
            self.timeline, config.units[0], specs, policy, self.decisions.append, delays, fairness=fairness
        )
        self.ended: list[int] = []
        self.requests: list[SimulatedRequest] = []

    def request_at(
        self, at_s: float, num_prompt: int = 10, num_output: int = 10, model: str = "m", **fields: Any
    ) -> SimulatedRequest:
        index = len(self.requests)
        arrived = SchedulingState(fields.pop("priority", 0), at_s, decode_s=fields.pop("work_s", 0.0))
        request = SimulatedRequest(
            index, model, num_prompt, num_output, fields.pop("max_new_tokens", num_output), arrived,
            LengthPrediction(num_output, num_output), Record(index, at_s), lambda one: self.ended.append(one.index),
            **fields,
        )  # fmt: skip
        self.requests.append(request)
        self.timeline.at(at_s, lambda: self.unit.enqueue(request))
        return request

    def run(self) -> None:
        """Runs to the end, and checks that nothing is left over."""
        self.timeline.run()
        assert sorted(self.ended) == list(range(len(self.requests)))
        assert self.unit.num_waiting == 0 and self.unit.unit.leased_bytes() == 0
        self.unit.unit.check_integrity()

    @property
    def records(self) -> list[Record]:
        return [request.record for request in self.requests]
