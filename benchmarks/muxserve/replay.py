"""Replays one unit on the simulator: the mesh's own arbiter, admission, quotas and block growth in virtual time."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.pool import Pool
from statistics import fmean
from types import MappingProxyType

from benchmarks.muxserve.cases import ModelCase, ModelOutcome, UnitCase
from benchmarks.muxserve.constants import Constants
from benchmarks.muxserve.lengths import Lengths
from benchmarks.muxserve.table_times import TableStepTimes, unloaded_latency_s, unloaded_targets_s
from loadtest.record import Record
from muxmesh.config.schema import UnitConfig
from muxmesh.config.slo_config import SloConfig
from muxmesh.errors import ConfigError
from muxmesh.models.model_spec import SIM_SPEC, ModelSpec
from muxmesh.placement.muxserve_files import LLAMA_SIZES
from muxmesh.placement.profile import Profile
from muxmesh.placement.step_table import StepTable
from muxmesh.scheduling_policy import FCFS
from muxmesh.types import LengthPrediction, SchedulingState
from simulator.simulated_request import SimulatedRequest
from simulator.simulated_unit import Decision, SimulatedUnit
from simulator.step_times import linear_slowdown
from simulator.timeline import Timeline

SLO_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 17, 20, 30, 50, 70, 100)
_SLAB_BYTES = 256 * 2**20
_BLOCK_SIZE = 32
_MAX_TOKENS = 4096
_PROMPT_TOKENS_PER_STEP = 4096


@dataclass(frozen=True)
class Replayer:
    """Replays units with one profile, one source of lengths, one set of constants and one seed."""

    profile: Profile
    lengths: Lengths
    constants: Constants
    seed: int = 1

    def replay(self, case: UnitCase) -> list[ModelOutcome]:
        """Runs a unit from its first arrival to its last end. Raises ConfigError if it has no memory for KV."""
        timeline = Timeline()
        entrance = _Entrance(timeline, case.strict_order)
        entrance.unit = SimulatedUnit(
            timeline,
            unit_config(case, self.constants, self._slos(case)),
            {one.name: _spec(one.kind) for one in case.models},
            FCFS,
            entrance.on_decision,
            slowdown=linear_slowdown(self.constants.contention, 1 + self.constants.overhead),
            times={one.name: TableStepTimes(self._table(one, case.num_devices)) for one in case.models},
        )
        requests = {one.name: self._requests(one) for one in case.models}
        for of_model in requests.values():
            for request in of_model:
                timeline.at(request.record.scheduled_s, partial(entrance.arrive, request))
        timeline.run()
        return [self._outcome(one, requests[one.name]) for one in case.models]

    def _table(self, model: ModelCase, degree: int) -> StepTable:
        tables = self.profile.models[model.kind].smoothed
        if degree not in tables:
            raise ConfigError(f"{model.name}: {model.kind}: the profile has no tensor-parallel degree {degree}")
        return tables[degree]

    def _slos(self, case: UnitCase) -> dict[str, SloConfig]:
        """Model → the limits of its SLO; empty without one."""
        if case.slo_scale is None:
            return {}
        found = {}
        for one in case.models:
            ttft_s, tpot_s = unloaded_targets_s(self._table(one, one.slo_degree), one.mean_prompt, one.mean_output)
            found[one.name] = SloConfig(ttft_s=case.slo_scale * ttft_s, tpot_s=case.slo_scale * tpot_s)
        return found

    def _requests(self, model: ModelCase) -> list[SimulatedRequest]:
        prediction = LengthPrediction(model.mean_output, 2 * model.mean_output)
        return [
            SimulatedRequest(
                index=index,
                model=model.name,
                num_prompt=prompt,
                num_output=output,
                max_new_tokens=max(output, _MAX_TOKENS // 2),
                arrived=SchedulingState(0, at_s),
                prediction=prediction,
                record=Record(index, at_s, model.name),
                on_end=lambda ended: None,
            )
            for index, (at_s, prompt, output) in enumerate(model.requests(self.lengths, self.seed))
        ]

    def _outcome(self, model: ModelCase, requests: Sequence[SimulatedRequest]) -> ModelOutcome:
        table = self._table(model, model.slo_degree)
        records = [one.record for one in requests]
        relative = sorted(
            one.record.e2el_s / unloaded_latency_s(table, one.num_prompt, one.num_output) for one in requests
        )
        return ModelOutcome(
            name=model.name,
            rate=model.rate,
            num_requests=len(records),
            throughput=len(records) / max(one.ended_s or 0.0 for one in records),
            latency_s=fmean(one.e2el_s for one in records),
            ttft_s=fmean(one.ttft_s for one in records),
            within_slo={scale: bisect_right(relative, scale) for scale in SLO_SCALES},
        )


def on_all_cores(pool: Pool, replayer: Replayer, units: Sequence[UnitCase]) -> list[list[ModelOutcome]]:
    """Replays units, the largest first, and returns the outcomes in the order of ``units``."""
    order = sorted(range(len(units)), key=lambda one: -units[one].num_requests)
    found = dict(zip(order, pool.map(replayer.replay, [units[one] for one in order], chunksize=1), strict=True))
    return [found[one] for one in range(len(units))]


class _Entrance:
    """Passes arriving requests to the unit: at once, or in strict order, each when the one before it is admitted."""

    unit: SimulatedUnit

    def __init__(self, timeline: Timeline, strict_order: bool) -> None:
        self._timeline = timeline
        self._strict_order = strict_order
        self._waiting: deque[SimulatedRequest] = deque()
        self._first: SimulatedRequest | None = None
        """The request that the unit has not admitted yet."""

    def arrive(self, request: SimulatedRequest) -> None:
        request.slo = self.unit.slo_targets(request.model, request.num_prompt)
        if not self._strict_order:
            self.unit.enqueue(request)
            return
        self._waiting.append(request)
        self._pass_on()

    def on_decision(self, decision: Decision) -> None:
        first = self._first
        if first is not None and (decision.model, decision.index) == (first.model, first.index):
            self._first = None
            self._timeline.at(self._timeline.now_s, self._pass_on)

    def _pass_on(self) -> None:
        if self._first is None and self._waiting:
            self._first = self._waiting.popleft()
            self.unit.enqueue(self._first)


def kv_pool_bytes(case: UnitCase, constants: Constants) -> int:
    """Memory for KV: the usable part of the devices less the weights."""
    weights = sum(LLAMA_SIZES[one.kind].weights_bytes for one in case.models)
    return int(constants.device_memory_bytes * constants.memory_fraction * case.num_devices - weights)


def unit_config(
    case: UnitCase, constants: Constants, slos: Mapping[str, SloConfig] = MappingProxyType({})
) -> UnitConfig:
    """The unit as the mesh would be configured to serve it, with the SLOs of models.

    Raises ConfigError if it has no memory for KV.
    """
    pool = kv_pool_bytes(case, constants)
    if pool < 2 * _SLAB_BYTES:
        names = ", ".join(one.name for one in case.models)
        raise ConfigError(f"{case.name}: {names} leave {pool} bytes for KV on {case.num_devices} devices")
    models = [
        {
            "name": one.name,
            "engine": "sim",
            "dtype": "float16",
            "block_size": _BLOCK_SIZE,
            "max_num_seqs": one.max_num_seqs,
            "max_model_len": _MAX_TOKENS,
            "kv_answer_tokens": 1,
            "prefill_token_budget": _PROMPT_TOKENS_PER_STEP,
            "compute_share": {"prefill": one.prefill_share, "decode": one.decode_share},
            "expected_rate": one.rate if case.mode == "adbs" else None,
            "slo": slos.get(one.name),
        }
        for one in case.models
    ]
    arbiter = {
        "mode": case.mode, "over_subscription": case.over_subscription, "max_overtakes": case.max_overtakes,
        "stall_budget": case.stall_budget,
    }  # fmt: skip
    content = {
        "name": case.name, "device": "cuda:0", "mps": "on", "kv_pool": pool, "slab": _SLAB_BYTES, "arbiter": arbiter,
        "models": models,
    }  # fmt: skip
    return UnitConfig.model_validate(content)


def _spec(kind: str) -> ModelSpec:
    size = LLAMA_SIZES[kind]
    return replace(
        SIM_SPEC,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        num_kv_heads=size.num_heads,
        head_dim=size.head_dim,
        context_len=_MAX_TOKENS,
    )
