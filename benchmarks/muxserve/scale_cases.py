"""Workloads at the size of the paper, and what each system makes of them. Pure.

Three systems serve the same requests: `muxmesh`, ADBS on our plan (`scale_plans`); `spatial`, every model on devices of
its own; `temporal`, the units of our plan with one step of one worker at a time on the whole device. Ablations change
one thing of `muxmesh`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.muxserve.cases import ModelCase, UnitCase
from benchmarks.muxserve.constants import Constants
from benchmarks.muxserve.estimators import Estimators
from benchmarks.muxserve.measured_cases import (
    HIGHEST_RATE,
    MAX_NUM_SEQS,
    OVER_SUBSCRIPTION,
    SLO_DEVICES,
    SPATIAL_SHARES,
    spatial_devices,
)
from benchmarks.plan_search import searched_plans
from muxmesh.placement.muxserve_files import LLAMA_SIZES, PlacementInput
from muxmesh.placement.plan import ModelLoad, Plan
from muxmesh.placement.search import search
from muxmesh.placement.unit_choices import Objective

KINDS = ("llama-7b",) * 12 + ("llama-13b",) * 4 + ("llama-30b",) * 2 + ("llama-65b",)
"""The models of the synthetic workloads, by falling rate."""
ALPHAS = (0.7, 0.9, 1.3, 1.7, 2.1)
SCALES = (0.5, 0.75, 1.0, 1.25)
MEAN_PROMPT, MEAN_OUTPUT = 161.0, 338.0
OUR_SLO_SCALE = 4.0
"""The SLO of every model on plans of searches. The baselines have no use for one."""
SLO_SCALES_TRIED = (None, 2.0, 4.0, 8.0)
"""SLOs that a unit may have; the replays that choose plans choose among them, too."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Models with their rates, for ``duration_s`` seconds."""

    name: str
    loads: tuple[ModelLoad, ...]
    duration_s: float
    spatial_devices: Mapping[str, int]
    """Of each model, if it has devices of its own."""


def synthetic(alpha: float, scale: float, duration_s: float) -> Workload:
    """The k-th of 19 models gets ``40 * scale * k ** -alpha`` requests per second."""
    loads = tuple(
        ModelLoad(f"llm-{rank - 1}", kind, HIGHEST_RATE * scale * rank**-alpha, MEAN_PROMPT, MEAN_OUTPUT)
        for rank, kind in enumerate(KINDS, 1)
    )
    return Workload(
        f"alpha {alpha:g} x {scale:g}", loads, duration_s, {one.name: SLO_DEVICES[one.kind] for one in loads}
    )


def traced(
    placement: PlacementInput, duration_s: float, lengths: Mapping[str, tuple[float, float]] | None = None
) -> Workload:
    """The models and rates of a placement input. ``lengths``: mean prompt and output tokens of each model."""
    mean = (MEAN_PROMPT, MEAN_OUTPUT)
    loads = tuple(
        ModelLoad(one.name, one.kind, one.rate, *(lengths or {}).get(one.name, mean)) for one in placement.models
    )
    return Workload(placement.what.partition(":")[0], loads, duration_s, spatial_devices(placement))


def greedy_plan(workload: Workload, estimators: Estimators) -> Plan:
    """MuxServe's Alg. 1 and 2 on its own estimator, without local search."""
    choices = estimators.choices(workload.loads, Objective(reference=1.0, corrected=0.0))
    return search(choices, max_moves=0).plans[0]


def searched_plan(workload: Workload, estimators: Estimators, max_moves: int) -> Plan:
    """The best plan of one search on the corrected estimator."""
    return search(estimators.choices(workload.loads, Objective()), max_moves=max_moves).plans[0]


def pool_of_units(
    workload: Workload, estimators: Estimators, constants: Constants, num_seeds: int, max_moves: int
) -> list[UnitCase]:
    """Units to make plans of: those of `spatial`, every model alone on more or fewer devices, and those of searches."""
    plans = searched_plans(partial(estimators.choices, workload.loads), num_seeds, max_moves)
    placed = tuple(dict.fromkeys(unit for plan in plans for unit in plan.units))
    shared = planned_units(Plan(placed), workload, OUR_SLO_SCALE)
    return [*spatial_units(workload, constants), *alone_units(workload, estimators, constants), *shared]


def alone_units(workload: Workload, estimators: Estimators, constants: Constants) -> list[UnitCase]:
    """Every model alone, on each number of devices that holds it."""
    choices = estimators.choices(workload.loads, Objective())
    alone: list[UnitCase] = []
    for num_devices in estimators.cluster.unit_sizes:
        fitting = [load for index, load in enumerate(workload.loads) if choices.best(num_devices, frozenset({index}))]
        devices = {load.name: num_devices for load in fitting}
        alone += spatial_units(replace(workload, loads=tuple(fitting), spatial_devices=devices), constants)
    return alone


def planned_units(plan: Plan, workload: Workload, slo_scale: float | None = None) -> list[UnitCase]:
    """ADBS on a plan. ``slo_scale``: see `UnitCase`."""
    return [
        UnitCase(
            name=f"unit{index}",
            num_devices=unit.num_devices,
            models=tuple(
                _model(one.load, workload, one.prefill_share, one.decode_share, MAX_NUM_SEQS) for one in unit.models
            ),
            over_subscription=OVER_SUBSCRIPTION,
            max_overtakes=8,
            stall_budget=0.1,
            slo_scale=slo_scale,
        )
        for index, unit in enumerate(plan.units)
    ]


def published_units(placement: PlacementInput, workload: Workload) -> list[UnitCase]:
    """ADBS on the plan that MuxServe's authors published, with its shares."""
    loads = {one.name: one for one in workload.loads}
    return [
        UnitCase(
            name=f"unit{index}",
            num_devices=unit.num_devices,
            models=tuple(
                _model(loads[one.name], workload, one.prefill_share, one.decode_share, MAX_NUM_SEQS)
                for one in unit.models
            ),
            over_subscription=OVER_SUBSCRIPTION,
            max_overtakes=8,
            stall_budget=0.1,
        )
        for index, unit in enumerate(placement.published_units)
    ]


def spatial_units(workload: Workload, constants: Constants) -> list[UnitCase]:
    """Every model alone."""
    return [
        UnitCase(
            name=f"unit{index}",
            num_devices=workload.spatial_devices[load.name],
            models=(_model(load, workload, *SPATIAL_SHARES, constants.baseline_max_num_seqs),),
            over_subscription=OVER_SUBSCRIPTION,
        )
        for index, load in enumerate(workload.loads)
    ]


def temporal_units(units: Sequence[UnitCase], constants: Constants) -> list[UnitCase]:
    """The same units, one step at a time, prefills in strict order of arrival: as MuxServe's authors measured it."""
    return [
        replace(
            unit,
            mode="temporal",
            over_subscription=0,
            max_overtakes=1_000_000,
            strict_order=True,
            slo_scale=None,
            models=tuple(
                replace(one, prefill_share=100, decode_share=100, max_num_seqs=constants.baseline_max_num_seqs)
                for one in unit.models
            ),
        )
        for unit in units
    ]


def lasting(unit: UnitCase, duration_s: float) -> UnitCase:
    """The unit with arrivals for another duration."""
    return replace(
        unit,
        models=tuple(
            replace(one, num_requests=max(1, round(one.rate * duration_s)), duration_s=duration_s)
            for one in unit.models
        ),
    )


def variants(unit: UnitCase) -> list[UnitCase]:
    """The unit with other decode shares, with one share for all, and with other SLOs or none."""
    shares = dict.fromkeys([*share_variants(unit), phases_together(unit)])
    return [*shares, *(replace(unit, slo_scale=one) for one in SLO_SCALES_TRIED if one != unit.slo_scale)]


def share_variants(unit: UnitCase) -> list[UnitCase]:
    """The unit with other decode shares, among which a short replay chooses.

    The planner's estimate has every decode running all the time. Small shares leave capacity to prefills beside
    decodes, large ones are faster while a device is mostly idle; which is better depends on the load.
    """
    planned = tuple(one.decode_share for one in unit.models)
    tried = (30, 40, 50, 100) if len(planned) > 1 else (100,)
    shares = [planned, *((share,) * len(planned) for share in tried)]
    return [
        replace(
            unit,
            models=tuple(replace(one, decode_share=share) for one, share in zip(unit.models, chosen, strict=True)),
        )
        for chosen in dict.fromkeys(shares)
    ]


def phases_together(unit: UnitCase) -> UnitCase:
    """Both phases of all models have one share: an equal part of the device, with its over-subscription."""
    share = min(100, (100 + unit.over_subscription) // len(unit.models))
    return replace(unit, models=tuple(replace(one, prefill_share=share, decode_share=share) for one in unit.models))


def static_pool(unit: UnitCase, pool_bytes: int) -> UnitCase:
    """Ablation: every model has an equal part of the KV pool, which bounds its sequences by their mean length."""
    part = pool_bytes / len(unit.models)

    def cap(model: ModelCase) -> int:
        tokens = model.mean_prompt + model.mean_output
        return max(1, int(part / (tokens * LLAMA_SIZES[model.kind].kv_bytes_per_token)))

    return replace(
        unit, models=tuple(replace(one, max_num_seqs=min(one.max_num_seqs, cap(one))) for one in unit.models)
    )


def _model(load: ModelLoad, workload: Workload, prefill_share: int, decode_share: int, cap: int) -> ModelCase:
    return ModelCase(
        name=load.name,
        kind=load.kind,
        rate=load.rate,
        num_requests=max(1, round(load.rate * workload.duration_s)),
        prefill_share=prefill_share,
        decode_share=decode_share,
        max_num_seqs=cap,
        mean_prompt=load.prompt_tokens,
        mean_output=load.output_tokens,
        duration_s=workload.duration_s,
        slo_degree=SLO_DEVICES[load.kind],
    )
