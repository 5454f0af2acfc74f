"""Runs a workload on a mesh in virtual time, with the requests and the report of a load test of the real mesh.

Holds the router's part: validation, overload, length forecasts and the choice of a unit. The rest is in
`simulator.simulated_unit`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from zlib import crc32

from kvstore.residency_journal import ResidencyJournal
from loadtest.record import Record, Run
from loadtest.spec import Spec
from loadtest.workload import Body, Sketch, sketch
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import MeshConfig
from muxmesh.errors import ConfigError, InvalidRequest, Overloaded
from muxmesh.models.model_spec import ModelSpec
from muxmesh.predictor.start_order import StartOrder
from muxmesh.quoting import named
from muxmesh.residency_format import ResidencySnapshot, block_keys
from muxmesh.rpc.status_codes import status_code
from muxmesh.scheduling_policy import PolicyName
from muxmesh.types import SchedulingState
from router.expected_work import ExpectedOutput
from router.generation import StoppingOptions
from router.queue_limit import check_total
from router.request_validation import check_prompt_length, resolve_stopping
from router.residency import ResidencyIndex
from router.served_models import ModelLimits
from router.unit_choice import Candidate, assumed_costs, choose
from simulator.forecasts import ForecastInput, Forecasts
from simulator.simulated_request import SimulatedRequest
from simulator.simulated_unit import Decision, KvChoice, SimulatedUnit
from simulator.step_times import Slowdown, StepTimes, no_slowdown
from simulator.timeline import NO_DELAYS, Delays, Timeline
from simulator.unit_use import UnitUse

ChooseUnit = Callable[[Sequence[Candidate], Sequence[bytes], int], int]
"""The index of the candidate that a request is sent to: of candidates, block hashes of the prompt, and the number of
choices before.
"""
_ODD = 0x9E3779B97F4A7C15
"""2**64 divided by the golden ratio: products with whole numbers are far apart."""
RESIDENCY_DELAY_S = 0.1
"""After this time a router knows of a change of a prefix cache."""


def by_first_token(candidates: Sequence[Candidate], hashes: Sequence[bytes], turn: int) -> int:
    """The choice of a real router, see `router.unit_choice`."""
    return candidates.index(choose(candidates, turn).candidate)


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """The outcome of a simulation."""

    run: Run
    num_events: int
    units: Mapping[str, UnitUse]

    @property
    def num_requeued(self) -> int:
        """Pre-empted sequences whose KV was freed and computed again."""
        return sum(unit.num_requeued for unit in self.units.values())

    @property
    def busy_s(self) -> dict[str, float]:
        """Unit → seconds in which its device computed."""
        return {name: unit.busy_s for name, unit in self.units.items()}


def requests_of(spec: Spec) -> list[Sketch]:
    """The workload's requests. Raises ConfigError if the length of an output is unknown."""
    sketches = sketch(spec)
    if any(one.body.num_output is None for one in sketches):
        raise ConfigError(
            f"simulate: {spec.prompts}: every line needs output_tokens (or n_out), since no model runs in a simulation"
        )
    return sketches


def true_length(request: Sketch) -> int:
    """The length of the request's output, in tokens."""
    return max(1, min(request.body.num_output or 1, request.max_new_tokens))


def simulate(
    config: MeshConfig,
    specs: Mapping[str, ModelSpec],
    sketches: Sequence[Sketch],
    forecasts: Forecasts,
    policy: PolicyName | None = None,
    on_decision: Callable[[Decision], None] | None = None,
    delays: Delays = NO_DELAYS,
    slowdown: Slowdown = no_slowdown,
    times: Mapping[tuple[str, str], StepTimes] | None = None,
    on_kv_choice: Callable[[KvChoice], None] | None = None,
    tenant_weights: Mapping[str, float] = MappingProxyType({}),
    *,
    choose_unit: ChooseUnit = by_first_token,
    residency_delay_s: float = RESIDENCY_DELAY_S,
) -> SimulationResult:
    """Simulates from the first arrival to the last end.

    ``specs`` has one entry for each model of ``config``. ``policy`` None: the configured one. ``on_decision`` is called
    at each admission. ``slowdown``: of the workers of a device beside each other. ``times``: (unit, model) → step
    times; a model without an entry has those of the sim engine. ``on_kv_choice``: see `SimulatedUnit`.
    ``tenant_weights``: a tenant without an entry has weight 1. ``choose_unit``: called for each request for a model of
    several units. ``residency_delay_s``: until a router knows of a change of a prefix cache. Raises ConfigError for a
    request for a model that ``config`` does not serve.
    """
    order = config.order.scheduling_policy()
    order = order if policy is None else replace(order, name=policy)
    timeline = Timeline()
    units = {
        unit.name: SimulatedUnit(
            timeline, unit, specs, order, on_decision, delays, slowdown,
            {model: found for (name, model), found in (times or {}).items() if name == unit.name},
            on_kv_choice, config.order.fairness_settings(),
        )
        for unit in config.units
    }  # fmt: skip
    router = _Router(timeline, config, units, specs, forecasts, tenant_weights, choose_unit)
    if len(units) > 1:
        for unit_name, unit in units.items():
            _follow(timeline, unit_name, unit, router.residency, residency_delay_s)
    records = [Record(one.index, one.at_s, one.model, one.tenant, one.priority) for one in sketches]
    router.schedule_arrivals(sketches, records)
    timeline.run()
    ended_s = max((record.ended_s or 0.0 for record in records), default=0.0)
    use = {name: unit.use for name, unit in units.items()}
    return SimulationResult(Run(records, ended_s, token_times=False), timeline.num_events, use)


def _follow(timeline: Timeline, name: str, unit: SimulatedUnit, index: ResidencyIndex, delay_s: float) -> None:
    """Lets ``index`` have the changes of a unit's prefix cache after ``delay_s``."""
    journal = ResidencyJournal(0)
    index.load(name, ResidencySnapshot(0, 0))

    def publish() -> None:
        if journal.has_lost_changes:
            index.load(name, journal.take_snapshot(unit.unit.blocks.published()))
        elif (batch := journal.take_batch()) is not None:
            index.apply(name, batch)

    journal.on_change = lambda: timeline.after(delay_s, publish)
    unit.unit.blocks.on_published = journal.note


class _Router:
    """The part of a router before a request is queued and after it has ended."""

    def __init__(
        self,
        timeline: Timeline,
        config: MeshConfig,
        units: Mapping[str, SimulatedUnit],
        specs: Mapping[str, ModelSpec],
        forecasts: Forecasts,
        tenant_weights: Mapping[str, float],
        choose_unit: ChooseUnit,
    ) -> None:
        self.residency = ResidencyIndex()
        self._timeline = timeline
        self._tenant_weights = tenant_weights
        self._units = units
        self._choose = choose_unit
        self._num_choices = 0
        self._forecasts = forecasts
        self._start_orders: defaultdict[str, StartOrder[tuple[object, int, bool]]] = defaultdict(StartOrder)
        self._max_waiting = config.router.max_waiting_requests
        self._placements = {
            name: [(unit, model) for unit, model in config.placements() if model.name == name]
            for name in config.models()
        }
        self._limits = {
            name: ModelLimits.of(model, specs[name], self._placements[name]) for name, model in config.models().items()
        }
        self._default = next(iter(self._placements))

    def _waiting(self) -> dict[str, int]:
        """Queued requests of each model."""
        return {
            name: sum(self._units[unit.name].num_queued(name) for unit, _ in placed)
            for name, placed in self._placements.items()
        }

    def schedule_arrivals(self, sketches: Sequence[Sketch], records: Sequence[Record]) -> None:
        """Schedules all arrivals; only the next one is on the timeline. Raises ConfigError, see `simulate`."""
        served = ", ".join(self._placements)
        for request in sketches:
            if request.model is None and len(self._placements) > 1:
                raise ConfigError(f"workload: models=... has to name one of: {served}")
            if request.model is not None and request.model not in self._placements:
                raise ConfigError(f"workload: models={named(request.model)}: not served; these are: {served}")
        arrivals = iter(zip(sketches, records, strict=True))

        def schedule_next() -> None:
            if (arrival := next(arrivals, None)) is not None:
                self._timeline.at(arrival[0].at_s, lambda: arrive(*arrival))

        def arrive(request: Sketch, record: Record) -> None:
            schedule_next()
            self._arrive(request, record)

        schedule_next()

    def _arrive(self, request: Sketch, record: Record) -> None:
        record.sent_s = self._timeline.now_s
        name = request.model or self._default
        num_prompt, num_output = request.body.prompt_tokens, true_length(request)
        try:
            check_prompt_length("prompt", num_prompt, self._limits[name])
            stopping = resolve_stopping(StoppingOptions(request.max_new_tokens), self._limits[name], num_prompt)
            check_total(self._waiting(), name, 1, self._max_waiting)
        except (InvalidRequest, Overloaded) as error:
            record.status, record.error = status_code(error).name, str(error)
            record.ended_s = self._timeline.now_s
            return
        prediction, source, forecast = self._forecasts.forecast(
            ForecastInput(request.body.text, name, request.tenant or "", num_output)
        )
        expected = ExpectedOutput(prediction, source, stopping)
        unit, hashes, num_cached = self._choose_unit(name, request.body, num_prompt, expected)
        scheduling = SchedulingState(request.priority, self._timeline.now_s)
        known = unit.expected_work.expect(scheduling, expected, num_prompt, unit.service(name), unit.num_queued(name))

        lengths, number = self._start_orders[name], 0

        def on_first_token() -> None:
            nonlocal number
            number = lengths.start()

        def on_end(ended: SimulatedRequest) -> None:
            if not number:
                return
            for known in lengths.end(number, (forecast, num_output, num_output >= request.max_new_tokens)):
                self._forecasts.observe(*known)

        simulated = SimulatedRequest(
            index=request.index,
            model=name,
            num_prompt=num_prompt,
            num_output=num_output,
            max_new_tokens=request.max_new_tokens,
            arrived=known.scheduling,
            prediction=known.prediction,
            record=record,
            on_first_token=on_first_token,
            on_end=on_end,
            slo=unit.slo_targets(name, num_prompt),
            hashes=hashes,
            tenant=request.tenant or "",
            tenant_weight=self._tenant_weights.get(request.tenant or "", 1.0),
        )
        unit.assign(simulated, num_cached)
        unit.enqueue(simulated)

    def _choose_unit(
        self, model: str, body: Body, num_prompt: int, expected: ExpectedOutput
    ) -> tuple[SimulatedUnit, tuple[bytes, ...], int]:
        """The unit for a request, the block hashes of its prompt there, and the tokens of it that are cached."""
        placed = self._placements[model]
        if len(placed) == 1:
            unit, config = placed[0]
            return self._units[unit.name], _block_hashes(body, num_prompt, config), 0
        distinct = {config.block_size: config for _, config in placed}
        chains = {size: _block_hashes(body, num_prompt, config) for size, config in distinct.items()}
        matched = {size: self.residency.match(block_keys(model, hashes)) for size, hashes in chains.items()}
        all_costs = assumed_costs([self._units[unit.name].service(model).costs for unit, _ in placed])
        candidates = []
        for (unit, config), costs in zip(placed, all_costs, strict=True):
            num_cached = min(num_prompt - 1, matched[config.block_size].get(unit.name, 0) * config.block_size)
            decode_tokens = max(0.0, expected.prediction.p50_tokens - 1)
            candidates.append(self._units[unit.name].candidate(model, num_prompt, num_cached, decode_tokens, costs))
        size = placed[0][1].block_size
        index = self._choose(candidates, chains[size], self._num_choices)
        self._num_choices += 1
        unit, config = placed[index]
        return self._units[unit.name], chains[config.block_size], candidates[index].num_cached_tokens


def _block_hashes(body: Body, num_prompt: int, model: ModelConfig) -> tuple[bytes, ...]:
    """Hashes of the prompt's full blocks.

    Two texts share blocks only if they are equal, two traced prompts as far as their hash ids are equal, and random
    prompts never: those have no hashes.
    """
    size, num_full = model.block_size, num_prompt // model.block_size
    if body.text is not None:
        text_hash = crc32(body.text.encode())
        return tuple(_mixed_hash(text_hash, index) for index in range(num_full))
    num_known = min(num_full, len(body.hash_ids) * body.hash_tokens // size)
    return tuple(_mixed_hash(body.hash_ids[index * size // body.hash_tokens], index) for index in range(num_known))


def _mixed_hash(hash_id: int, index: int) -> bytes:
    """16 bytes for the block at ``index`` of a prompt. The first 8 of them are as good as unique too."""
    mixed = (hash_id * _ODD + index) % 2**64
    return mixed.to_bytes(8) + index.to_bytes(8)
