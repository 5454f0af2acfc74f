"""A workload on a mesh in virtual time: the same requests, and the same report, as a load test of the real one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

from loadtest.record import Record, Run
from loadtest.spec import Spec
from loadtest.workload import Body, Sketch, sketch
from muxmesh.config.schema import MeshConfig, ModelConfig
from muxmesh.errors import ConfigError, InvalidRequest, Overloaded
from muxmesh.models.model_spec import ModelSpec
from muxmesh.rpc.status_codes import status_code
from muxmesh.scheduling_policy import PolicyName
from muxmesh.types import SchedulingState
from router.expected_work import ExpectedOutput
from router.generation import StoppingOptions
from router.request_validation import check_overload, resolve_stopping
from router.served_models import ModelLimits
from simulator.forecasts import Asked, Forecasts
from simulator.simulated_unit import Decision, SimulatedRequest, SimulatedUnit
from simulator.timeline import NO_DELAYS, Delays, Timeline

_BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Simulated:
    """The outcome. ``num_requeued``: answers that gave way for lack of KV memory and were computed again."""

    run: Run
    num_events: int
    num_requeued: int
    busy_s: Mapping[str, float]


def requests_of(spec: Spec) -> list[Sketch]:
    """The workload's requests. Raises ConfigError if an answer's length is nowhere said."""
    sketches = sketch(spec)
    if any(one.body.num_output is None for one in sketches):
        raise ConfigError(f"simulate: {spec.prompts}: every line needs output_tokens (or n_out): no model runs here")
    return sketches


def true_length(one: Sketch) -> int:
    """How long an answer gets, in tokens."""
    return max(1, min(one.body.num_output or 1, one.max_new_tokens))


def simulate(
    config: MeshConfig,
    specs: Mapping[str, ModelSpec],
    sketches: Sequence[Sketch],
    forecasts: Forecasts,
    policy: PolicyName | None = None,
    on_decision: Callable[[Decision], None] | None = None,
    delays: Delays = NO_DELAYS,
) -> Simulated:
    """Lets all requests arrive and end. ``policy`` None: as configured. ``delays``: what processes add to
    the engines' times. Raises ConfigError for a model it has not.
    """
    order = config.order.scheduling_policy()
    order = order if policy is None else replace(order, name=policy)
    timeline = Timeline()
    units = {unit.name: SimulatedUnit(timeline, unit, specs, order, on_decision, delays) for unit in config.units}
    router = _Router(timeline, config, units, specs, forecasts)
    records = [Record(one.index, one.at_s, one.model, one.tenant, one.priority) for one in sketches]
    router.arrivals(sketches, records)
    timeline.run()
    ended_s = max((record.ended_s or 0.0 for record in records), default=0.0)
    requeued = sum(unit.num_requeued for unit in units.values())
    busy_s = {name: unit.busy_s for name, unit in units.items()}
    return Simulated(Run(records, ended_s, token_times=False), timeline.num_events, requeued, busy_s)


class _Router:
    """What a router does before a request waits for a credit, and after it has ended."""

    def __init__(
        self,
        timeline: Timeline,
        config: MeshConfig,
        units: Mapping[str, SimulatedUnit],
        specs: Mapping[str, ModelSpec],
        forecasts: Forecasts,
    ) -> None:
        self._timeline = timeline
        self._units = units
        self._forecasts = forecasts
        self._max_waiting = config.router.max_waiting_requests
        self._placements = {
            name: [(unit, model) for unit, model in config.placements() if model.name == name]
            for name in config.models()
        }
        self._limits = {
            name: ModelLimits.of(model, specs[name], self._placements[name]) for name, model in config.models().items()
        }
        self._default = next(iter(self._placements))

    def arrivals(self, sketches: Sequence[Sketch], records: Sequence[Record]) -> None:
        """Requests arrive one after the other; only the next arrival is on the timeline."""
        served = ", ".join(self._placements)
        for one in sketches:
            if one.model is None and len(self._placements) > 1:
                raise ConfigError(f"workload: which model? models=... of: {served}")
            if one.model is not None and one.model not in self._placements:
                raise ConfigError(f"workload: models={one.model}: not served; these are: {served}")
        coming = iter(zip(sketches, records, strict=True))

        def schedule_next() -> None:
            if (arriving := next(coming, None)) is not None:
                self._timeline.at(arriving[0].at_s, lambda: arrive(*arriving))

        def arrive(one: Sketch, record: Record) -> None:
            schedule_next()
            self._arrive(one, record)

        schedule_next()

    def _arrive(self, one: Sketch, record: Record) -> None:
        record.sent_s = self._timeline.now_s
        name = one.model or self._default
        num_prompt, num_output = _num_prompt(one.body), true_length(one)
        num_waiting = sum(unit.num_waiting for unit in self._units.values())
        try:
            stopping = resolve_stopping(StoppingOptions(one.max_new_tokens), self._limits[name], num_prompt)
            check_overload(num_waiting, 1, self._max_waiting)
        except (InvalidRequest, Overloaded) as error:
            record.status, record.error = status_code(error).name, str(error)
            record.ended_s = self._timeline.now_s
            return
        unit, model = self._choose_unit(name)
        prediction, source, memory = self._forecasts.ask(Asked(one.body.text, name, one.tenant or "", num_output))
        expected = ExpectedOutput(prediction, source, stopping)
        scheduling = SchedulingState(one.priority, self._timeline.now_s)
        scheduling = unit.expected_work.expect(
            scheduling, expected, num_prompt, unit.service(name), unit.num_queued(name)
        )

        def ended(request: SimulatedRequest) -> None:
            if request.record.is_ok:
                self._forecasts.observe(memory, num_output, num_output >= one.max_new_tokens)

        unit.wait(
            SimulatedRequest(
                index=one.index,
                model=name,
                num_prompt=num_prompt,
                num_output=num_output,
                max_new_tokens=one.max_new_tokens,
                arrived=scheduling,
                prediction=expected.prediction,
                record=record,
                on_end=ended,
                hashes=_hashes(one.body, num_prompt, model),
            )
        )

    def _choose_unit(self, model: str) -> tuple[SimulatedUnit, ModelConfig]:
        """As `router.units.Units.choose`: the unit with the fewest queued requests for the model."""
        placed = ((self._units[unit.name], config) for unit, config in self._placements[model])
        return min(placed, key=lambda one: one[0].num_queued(model))


def _num_prompt(body: Body) -> int:
    """Tokens of a prompt; of a text that nobody counted, a guess."""
    if body.num_input or body.text is None:
        return max(1, body.num_input)
    return max(1, math.ceil(len(body.text.encode()) / _BYTES_PER_TOKEN))


def _hashes(body: Body, num_prompt: int, model: ModelConfig) -> tuple[bytes, ...]:
    """Names of the prompt's full blocks: equal where prompts begin alike. Random prompts share nothing."""
    size, full = model.block_size, num_prompt // model.block_size
    if body.text is not None:
        name = crc32(body.text.encode()).to_bytes(8)
        return tuple(name + place.to_bytes(8) for place in range(full))
    covered = min(full, len(body.hash_ids) * body.hash_tokens // size)
    return tuple(
        (body.hash_ids[place * size // body.hash_tokens] % 2**64).to_bytes(8) + place.to_bytes(8)
        for place in range(covered)
    )
