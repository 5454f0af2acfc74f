"""Planned requests in virtual time, on sim engines. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.shared_device.loads import Stream, planned
from loadtest.record import Record, Run
from loadtest.slo import Unloaded, fit_unloaded
from loadtest.workload import Body, PlannedRequest, Sketch
from muxmesh.config.schema import MeshConfig
from muxmesh.models.model_spec import SIM_SPEC
from simulator.forecasts import TrueLengths
from simulator.run import simulate
from simulator.timeline import MEASURED


def in_virtual_time(config: Mapping[str, Any], requests: Sequence[PlannedRequest]) -> list[Record]:
    """The outcome of each request, whose output has its planned length."""
    return run_in_virtual_time(config, requests).records


def run_in_virtual_time(config: Mapping[str, Any], requests: Sequence[PlannedRequest]) -> Run:
    """Like `in_virtual_time`."""
    parsed = MeshConfig.model_validate(config)
    sketches = [
        Sketch(
            one.index, one.at_s, Body(None, len(one.prompt), one.max_new_tokens), one.max_new_tokens, True, one.seed,
            one.model, None, 0,
        )
        for one in requests
    ]  # fmt: skip
    specs = dict.fromkeys(parsed.models(), SIM_SPEC)
    return simulate(parsed, specs, sketches, TrueLengths(), delays=MEASURED).run


def unloaded_in_virtual_time(
    config: Mapping[str, Any], contents: Mapping[str, str], seed: int, vocabulary: range
) -> dict[str, Unloaded]:
    """Model → its latency alone on the device. ``contents``: what is sent to each model."""
    return {
        model: fit_unloaded(in_virtual_time(config, planned([Stream(model, 0.2, content)], 60.0, seed, vocabulary)))
        for model, content in contents.items()
    }
