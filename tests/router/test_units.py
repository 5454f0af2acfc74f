from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import pytest_asyncio

from muxmesh.block_hashes import KvIdentity, block_hashes
from muxmesh.clock import ManualClock
from muxmesh.config.model_config import ModelConfig
from muxmesh.errors import ModelNotFound
from muxmesh.rpc.channels import internal_channel
from muxmesh.scheduling_policy import FCFS
from muxmesh.step_cost import ModelCosts, StepCost
from muxmesh.types import EngineRequest, KvDemand, LengthPrediction, Sampling, SchedulingState, Stopping
from router.admission_client import UnitAdmission
from router.expected_work import ExpectedWork
from router.units import PlacedModel, UnitLink, Units
from tests.support.pipeline_parts import IDENTITY

REQUEST = EngineRequest(
    "r", "m", tuple(range(40, 60)), Sampling(), Stopping(300), SchedulingState(0, 0.0), tenant="t", cache_salt="s"
)


@dataclass
class Setup:
    """Unit "a" serves m and n, unit "b" only m. Both are connected."""

    units: Units
    waiting: list[asyncio.Task[Any]]

    def link(self, name: str) -> UnitLink:
        return next(link for link in self.units if link.name == name)

    async def wait_on(self, name: str, model: str, count: int = 1) -> None:
        """Queues requests for ``model`` on a unit, as the driver does."""
        admission = self.link(name).admission
        self.link(name).num_assigned[model] += count
        for _ in range(count):
            credit = admission.wait_for_credit(model, "", SchedulingState(0, 0.0), KvDemand(1, 1))
            self.waiting.append(asyncio.create_task(credit))
        await asyncio.sleep(0)


@pytest_asyncio.fixture
async def setup() -> AsyncIterator[Setup]:
    async with internal_channel("unix:/nowhere") as channel:

        def link(name: str, *models: str, block_size: int, kv_answer_tokens: int, identity: KvIdentity) -> UnitLink:
            admission = UnitAdmission("u", "r", channel, ManualClock(), FCFS)
            admission.connected.set()
            admission.fingerprints = dict.fromkeys(models, IDENTITY.weights)
            placed = {
                model: PlacedModel(
                    ModelConfig(name=model, block_size=cast(Any, block_size), kv_answer_tokens=kv_answer_tokens),
                    identity,
                )
                for model in models
            }
            return UnitLink(name, admission, cast(Any, None), cast(Any, None), placed, ExpectedWork(0.0))

        units = Units(
            [
                link("a", "m", "n", block_size=8, kv_answer_tokens=100, identity=IDENTITY),
                link("b", "m", block_size=16, kv_answer_tokens=500, identity=replace(IDENTITY, layout="other")),
            ]
        )
        setup = Setup(units, [])
        yield setup
        for task in setup.waiting:
            task.cancel()
        await asyncio.gather(*setup.waiting, return_exceptions=True)


async def test_the_unit_with_the_fewest_queued_requests_of_the_model_is_chosen(setup: Setup) -> None:
    assert setup.units.choose("m").name == "a"
    await setup.wait_on("a", "m")
    assert setup.units.choose("m").name == "b"
    await setup.wait_on("b", "m", 2)
    assert setup.units.choose("m").name == "a"


async def test_queued_requests_of_other_models_do_not_count(setup: Setup) -> None:
    await setup.wait_on("a", "n", 3)
    assert setup.units.choose("m").name == "a"


async def test_each_attempt_chooses_anew_so_requests_spread_over_the_units(setup: Setup) -> None:
    for _ in range(6):
        await setup.wait_on(setup.units.choose("m").name, "m")
    assert [link.admission.num_queued("m") for link in setup.units] == [3, 3]


async def test_a_connected_unit_is_preferred_though_more_requests_wait_there(setup: Setup) -> None:
    await setup.wait_on("b", "m", 5)
    setup.link("a").admission.connected.clear()
    assert setup.units.choose("m").name == "b"


async def test_without_a_connected_unit_requests_wait_for_one_that_serves_the_model(setup: Setup) -> None:
    for link in setup.units:
        link.admission.connected.clear()
    await setup.wait_on("a", "m")
    assert (setup.units.choose("m").name, setup.units.choose("n").name) == ("b", "a")


async def test_a_model_that_no_unit_serves_is_not_found(setup: Setup) -> None:
    with pytest.raises(ModelNotFound, match=r"^model: 'x' is not served by any unit; served: m, n$"):
        setup.units.choose("x")


async def test_a_model_that_is_removed_from_a_unit_is_served_by_the_other(setup: Setup) -> None:
    del setup.link("a").models["m"]
    assert setup.units.choose("m").name == "b"


async def test_queued_requests_are_counted_over_all_units(setup: Setup) -> None:
    await setup.wait_on("a", "m", 2)
    await setup.wait_on("b", "m", 3)
    await setup.wait_on("a", "n")
    assert (setup.units.num_queued("m"), setup.units.num_queued("n"), setup.units.num_queued("x")) == (5, 1, 0)


async def test_the_demand_follows_the_unit_s_own_block_size_and_reserve(setup: Setup) -> None:
    on_a, on_b = (setup.link(name).kv_demand(REQUEST) for name in "ab")
    assert (on_a.num_tokens, on_b.num_tokens) == (120, 320), "20 of the prompt, and at most 300 of the output"
    assert on_a.max_tokens == on_b.max_tokens == 320
    assert (len(on_a.block_hashes), len(on_b.block_hashes)) == (2, 1)
    assert on_a.block_hashes == block_hashes(REQUEST.prompt_token_ids, 8, IDENTITY.root("t", "s"))


async def test_hashes_are_of_the_weights_that_the_unit_has(setup: Setup) -> None:
    link, prompt = setup.link("a"), REQUEST.prompt_token_ids
    link.admission.fingerprints = {"m": "others", "n": IDENTITY.weights}
    root = replace(IDENTITY, weights="others").root("t", "s")
    assert link.kv_demand(REQUEST).block_hashes == block_hashes(prompt, 8, root)


async def test_before_the_unit_has_told_its_weights_nothing_is_found_in_its_cache(setup: Setup) -> None:
    link = setup.link("a")
    link.admission.fingerprints = {}
    assert link.kv_demand(REQUEST).block_hashes == ()


async def test_a_request_for_a_model_of_another_unit_has_no_demand_here(setup: Setup) -> None:
    with pytest.raises(KeyError):
        setup.link("b").kv_demand(replace(REQUEST, model="n"))


async def test_each_unit_has_its_own_mean_work(setup: Setup) -> None:
    assert setup.link("a").expected_work is not setup.link("b").expected_work


async def test_sequences_with_credits_count_like_queued_ones(setup: Setup) -> None:
    setup.link("a").num_assigned["m"] = 2  # of which the unit has issued the credits
    assert setup.units.choose("m").name == "b"
    await setup.wait_on("b", "m", 3)
    assert setup.units.choose("m").name == "a"
    setup.link("a").num_assigned["n"] = 9
    assert setup.units.choose("m").name == "a", "sequences of other models do not count"


async def test_a_model_that_is_removed_leaves_no_step_costs_to_another_one_of_its_name(setup: Setup) -> None:
    link, costs = setup.link("a"), ModelCosts(StepCost(1.0, 0.0, 0.0), StepCost(2.0, 0.0, 0.0))
    placed = link.models["m"]
    link.remove_model("m")
    for model in ("m", "n"):  # the sequences of m still run
        link.admission.costs[model] = costs
        link.admission.unloaded[model].observe(costs)
    link.add_model("m", placed)
    assert (list(link.models), list(link.admission.costs), list(link.admission.unloaded)) == (["n", "m"], ["n"], ["n"])
    for _ in range(2):
        link.remove_model("m")
    assert list(link.models) == ["n"]


async def test_with_p90_the_memory_of_nearly_all_predicted_outputs_is_reserved(setup: Setup) -> None:
    link, predicted = setup.link("a"), replace(REQUEST, prediction=LengthPrediction(50.0, 120.4))
    assert link.kv_demand(predicted).num_tokens == 20 + 100, "kv_answer_tokens"
    placed = link.models["m"]
    link.models["m"] = replace(placed, config=placed.config.model_copy(update={"kv_reserve": "p90"}))
    assert link.kv_demand(predicted).num_tokens == 20 + 121
    assert link.kv_demand(replace(REQUEST, prediction=None)).num_tokens == 20 + 100, "there is no prediction"
    resumed = replace(predicted, resume_token_ids=tuple(range(100)))
    remaining = math.ceil(LengthPrediction(50.0, 120.4).remaining_tokens(100, 0.1))
    assert link.kv_demand(resumed).num_tokens == 120 + remaining > 120 + 21
