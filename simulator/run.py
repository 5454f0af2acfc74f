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
from muxmesh.errors import ConfigError
from muxmesh.models.spec import ModelSpec
from muxmesh.order import Policy
from muxmesh.types import LengthPrediction, Standing, Stopping
from router.work import Outlook, Served
from simulator.forecasts import Asked, Forecasts
from simulator.timeline import NO_DELAYS, Delays, Timeline
from simulator.unit import Decision, Request, SimulatedUnit

_BYTES_PER_TOKEN = 4
_NOTHING = LengthPrediction(1.0, 1.0)


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
    policy: Policy | None = None,
    on_decision: Callable[[Decision], None] | None = None,
    delays: Delays = NO_DELAYS,
) -> Simulated:
    """Lets all requests arrive and end. ``policy`` None: as configured. ``delays``: what processes add to
    the engines' times. Raises ConfigError for a model it has not.
    """
    order = config.order.order()
    order = order if policy is None else replace(order, policy=policy)
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
        self._specs = specs
        self._forecasts = forecasts
        self._most_waiting = config.router.max_waiting_requests
        self._models = config.models()
        self._default = next(iter(self._models))

    def arrivals(self, sketches: Sequence[Sketch], records: Sequence[Record]) -> None:
        """Requests arrive one after the other; only the next arrival is on the timeline."""
        for one in sketches:
            if one.model is None and len(self._models) > 1:
                raise ConfigError(f"workload: which model? models=... of: {', '.join(self._models)}")
            if one.model is not None and one.model not in self._models:
                raise ConfigError(f"workload: models={one.model}: not served; these are: {', '.join(self._models)}")
        coming = iter(zip(sketches, records, strict=True))

        def next_one() -> None:
            if (arriving := next(coming, None)) is not None:
                self._timeline.at(arriving[0].at_s, lambda: arrive(*arriving))

        def arrive(one: Sketch, record: Record) -> None:
            next_one()
            self._arrive(one, record)

        next_one()

    def _arrive(self, one: Sketch, record: Record) -> None:
        record.sent_s = self._timeline.now_s
        name = one.model or self._default
        unit_config, model = self._models[name]
        unit = self._units[unit_config.name]
        num_prompt, num_output = _num_prompt(one.body), true_length(one)
        room = (model.max_model_len or self._specs[name].context_len) - num_prompt
        waiting = sum(each.num_waiting for each in self._units.values())
        if room < 1 or one.max_new_tokens > room:
            self._refuse(
                record,
                "INVALID_ARGUMENT",
                f"prompt and longest answer are {one.max_new_tokens - room} tokens past the context",
            )
            return
        if waiting >= self._most_waiting:
            self._refuse(record, "RESOURCE_EXHAUSTED", f"{waiting} requests are waiting")
            return
        said, source, memory = self._forecasts.ask(Asked(one.body.text, name, one.tenant or "", num_output))
        outlook = Outlook(said, source, Stopping(one.max_new_tokens))
        standing = unit.work.expect(
            Standing(one.priority, self._timeline.now_s), outlook, num_prompt,
            Served(name, unit.costs(name), model.prefill_token_budget), unit.num_waiting_for(name),
        )  # fmt: skip

        def ended(request: Request) -> None:
            if request.record.is_ok:
                self._forecasts.observe(memory, num_output, num_output >= one.max_new_tokens)

        unit.wait(
            Request(
                index=one.index,
                model=name,
                num_prompt=num_prompt,
                num_output=num_output,
                most_new_tokens=one.max_new_tokens,
                arrived=standing,
                prediction=outlook.prediction,
                record=record,
                on_end=ended,
                hashes=_hashes(one.body, num_prompt, model),
            )
        )

    def _refuse(self, record: Record, status: str, why: str) -> None:
        record.status, record.error, record.ended_s = status, why, self._timeline.now_s


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
