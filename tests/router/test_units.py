from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import pytest_asyncio

from muxmesh.block_hashes import KvIdentity, block_hashes, known_hashes
from muxmesh.clock import ManualClock
from muxmesh.config.model_config import ModelConfig
from muxmesh.errors import ModelNotFound
from muxmesh.residency_format import ResidencySnapshot, block_keys
from muxmesh.rpc.channels import internal_channel
from muxmesh.scheduling_policy import FCFS
from muxmesh.step_cost import ModelCosts, StepCost
from muxmesh.types import EngineRequest, KvDemand, LengthPrediction, Sampling, SchedulingState, Stopping
from router.admission_client import ReportedLoad, UnitAdmission
from router.expected_work import ExpectedWork
from router.residency import ResidencyIndex
from router.unit_choice import Candidate, Choice, ChoiceReason
from router.unit_link import PlacedModel, UnitLink
from router.units import ChosenUnit, Units
from tests.support.pipeline_parts import IDENTITY

REQUEST = EngineRequest(
    "r", "m", tuple(range(40, 60)), Sampling(), Stopping(300), SchedulingState(0, 0.0), tenant="t", cache_salt="s"
)


def demand(link: UnitLink, request: EngineRequest) -> KvDemand:
    """As `Units.choose` computes it."""
    root = link.chain_root(request)
    return link.kv_demand(request, None if root is None else known_hashes(request, *root))


@dataclass
class Setup:
    """Unit "a" serves m and n, unit "b" only m. Both are connected."""

    units: Units
    residency: ResidencyIndex
    waiting: list[asyncio.Task[Any]]

    def link(self, name: str) -> UnitLink:
        return next(link for link in self.units if link.name == name)

    async def wait_on(self, name: str, model: str, count: int = 1) -> None:
        """Queues requests for ``model`` on a unit, as `CreditWait` does."""
        admission = self.link(name).admission
        for _ in range(count):
            self.link(name).assigned.add(model, 0.0, 1.0)
            credit = admission.wait_for_credit(model, "", SchedulingState(0, 0.0), KvDemand(1, 1))
            self.waiting.append(asyncio.create_task(credit))
        await asyncio.sleep(0)

    def choose(self, request: EngineRequest | None = None, model: str = "m") -> str:
        return self.units.choose(request or replace(REQUEST, model=model)).link.name

    def chosen(self, name: str) -> ChosenUnit:
        """A unit at which `REQUEST` is queued."""
        candidate = Candidate(name, 20, 0, 0.0, 0.0, 0)
        choice = Choice(candidate, ChoiceReason.LOAD, "")
        return ChosenUnit(self.link(name), choice, demand(self.link(name), REQUEST), 0.0, 1.0, {None: None})

    def hold(self, name: str, num_blocks: int, request: EngineRequest) -> None:
        """Lets the unit be known to cache the first blocks of a request."""
        root = self.link(name).chain_root(request)
        assert root is not None
        hashes = known_hashes(request, *root)[:num_blocks]
        self.residency.load(name, ResidencySnapshot(1, 0, block_keys(request.model, hashes)))


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
            ],
            residency := ResidencyIndex(),
        )
        setup = Setup(units, residency, [])
        yield setup
        for task in setup.waiting:
            task.cancel()
        await asyncio.gather(*setup.waiting, return_exceptions=True)


async def test_the_unit_with_the_fewest_sequences_of_the_model_is_chosen(setup: Setup) -> None:
    assert setup.choose() == "a"
    await setup.wait_on("a", "m")
    assert setup.choose() == "b"
    await setup.wait_on("b", "m", 2)
    assert setup.choose() == "a"


async def test_sequences_of_other_models_do_not_take_slots(setup: Setup) -> None:
    await setup.wait_on("a", "n", 3)
    assert setup.choose() == "a"


async def test_equal_units_take_turns(setup: Setup) -> None:
    assert [setup.choose() for _ in range(4)] == ["a", "b", "a", "b"]
    assert setup.units.num_choices == {("a", ChoiceReason.LOAD): 2, ("b", ChoiceReason.LOAD): 2}


async def test_each_attempt_chooses_anew_so_requests_spread_over_the_units(setup: Setup) -> None:
    for _ in range(6):
        await setup.wait_on(setup.choose(), "m")
    assert [link.admission.num_queued("m") for link in setup.units] == [3, 3]


async def test_a_connected_unit_is_preferred_though_more_requests_wait_there(setup: Setup) -> None:
    await setup.wait_on("b", "m", 5)
    setup.link("a").admission.connected.clear()
    assert setup.choose() == setup.units.least_loaded("m").name == "b"


async def test_without_a_connected_unit_requests_wait_for_one_that_serves_the_model(setup: Setup) -> None:
    for link in setup.units:
        link.admission.connected.clear()
    await setup.wait_on("a", "m")
    assert (setup.choose(), setup.choose(model="n")) == ("b", "a")
    assert setup.units.least_loaded("m").name == "b"


async def test_the_unit_that_caches_most_of_the_prompt_is_chosen(setup: Setup) -> None:
    long = replace(REQUEST, prompt_token_ids=tuple(range(800)), bypass_prefix_cache=False)
    await setup.wait_on("b", "m", 2)
    setup.hold("a", 10, long)
    setup.hold("b", 40, long)
    chosen = setup.units.choose(long)
    assert (chosen.link.name, chosen.choice.reason) == ("b", ChoiceReason.PREFIX)
    assert chosen.choice.candidate.num_cached_tokens == 640, "40 blocks of 16 tokens"
    assert chosen.demand == chosen.link.kv_demand(long, chosen.demand.block_hashes)
    assert setup.choose(replace(long, bypass_prefix_cache=True)) == "a", "it may use none of it"
    assert setup.choose(replace(long, cache_salt="other")) == "a", "it has other blocks"
    setup.units.note_cached(chosen, 640)
    assert setup.units.num_cached_tokens == {("b", ChoiceReason.PREFIX): 640}


async def test_the_demand_follows_a_prediction_that_comes_after_the_choice(setup: Setup) -> None:
    link = setup.link("a")
    placed = link.models["m"]
    link.models["m"] = replace(placed, config=placed.config.model_copy(update={"kv_reserve": "p90"}))
    setup.link("b").remove_model("m")
    chosen = setup.units.choose(REQUEST)
    predicted = replace(REQUEST, prediction=LengthPrediction(20.0, 30.0))
    later = chosen.with_prediction_of(predicted)
    assert later.demand == demand(link, predicted) != chosen.demand
    assert later.demand.block_hashes == chosen.demand.block_hashes != ()


async def test_the_last_token_of_a_cached_prompt_is_computed(setup: Setup) -> None:
    request = replace(REQUEST, prompt_token_ids=tuple(range(64)))
    setup.hold("b", 4, request)
    assert setup.units.choose(request).choice.candidate.num_cached_tokens == 63


async def test_a_unit_without_residency_is_chosen_by_load_alone(setup: Setup) -> None:
    long = replace(REQUEST, prompt_token_ids=tuple(range(800)))
    setup.hold("b", 40, long)
    assert setup.choose(long) == "b"
    setup.residency.drop_all()
    await setup.wait_on("b", "m")
    assert setup.choose(long) == "a"


async def test_what_other_routers_have_on_a_unit_counts(setup: Setup) -> None:
    setup.link("a").admission.loads = {"m": ReportedLoad(num_sequences=1)}
    assert setup.choose() == "b"
    await setup.wait_on("b", "m", 2)
    assert setup.choose() == "a"
    costs = ModelCosts(StepCost(0.1, 0.001, 0.0), StepCost(0.01, 0.0, 0.0))
    setup.link("a").admission.costs = {"m": costs}
    setup.link("a").admission.loads = {"n": ReportedLoad(prefill_tokens=5000)}
    candidate = setup.units.choose(REQUEST).choice.candidate
    assert candidate.unit == "b", "prefill of any model is ahead of the request on a"


async def test_the_score_follows_from_the_costs_of_each_unit(setup: Setup) -> None:
    fast, slow = (ModelCosts(StepCost(0.0, token_s, 0.0), StepCost(0.01, 0.0, 0.0)) for token_s in (0.001, 0.01))
    setup.link("a").admission.costs, setup.link("b").admission.costs = {"m": slow}, {"m": fast}
    assert setup.choose() == "b"
    setup.link("b").admission.costs = {}
    assert {setup.choose(), setup.choose()} == {"a", "b"}, "one that has not measured is taken to be as fast"


async def test_a_unit_on_which_the_model_sleeps_is_left_out(setup: Setup) -> None:
    setup.link("a").admission.loads = {"m": ReportedLoad(is_asleep=True)}
    await setup.wait_on("b", "m", 2)
    assert setup.choose() == "b"
    setup.link("b").admission.loads = {"m": ReportedLoad(is_asleep=True)}
    assert setup.choose() == "a"


async def test_a_unit_whose_pool_is_too_small_is_left_out(setup: Setup) -> None:
    link = setup.link("a")
    link.models["m"] = replace(link.models["m"], capacity_tokens=REQUEST.max_tokens - 1)
    await setup.wait_on("b", "m", 2)
    assert setup.choose() == "b"
    link.models["m"] = replace(link.models["m"], capacity_tokens=REQUEST.max_tokens)
    assert setup.choose() == "a"


async def test_a_queued_request_moves_to_a_unit_that_idles(setup: Setup) -> None:
    slots = ModelConfig(name="m").max_num_seqs
    costs = ModelCosts(StepCost(0.01, 0.001, 0.0), StepCost(0.01, 0.0, 0.0))
    for link in setup.units:
        link.admission.costs = {"m": costs}
    for _ in range(slots):
        setup.link("a").assigned.credited(setup.link("a").assigned.add("m", 0.0, 10.0))
    assert setup.units.choose_better(REQUEST, setup.chosen("b")) is None, "it is better off where it is"
    await setup.wait_on("a", "m", 4)
    better = setup.units.choose_better(replace(REQUEST, scheduling=SchedulingState(0, 1.0)), setup.chosen("a"))
    assert better is not None and better.link.name == "b"
    for _ in range(slots):
        setup.link("b").assigned.add("m", 0.0, 10.0)
    assert setup.units.choose_better(REQUEST, setup.chosen("a")) is None, "no other unit has a free slot"


async def test_a_request_leaves_a_unit_that_is_lost_or_stays_if_it_is_the_only_one(setup: Setup) -> None:
    setup.link("a").admission.connected.clear()
    better = setup.units.choose_better(REQUEST, setup.chosen("a"))
    assert better is not None and better.link.name == "b"
    was_at_b = setup.chosen("b")
    setup.link("b").remove_model("m")
    assert setup.units.choose_better(REQUEST, setup.chosen("a")) is None
    assert setup.units.choose_better(REQUEST, was_at_b) is None, "its unit does not serve the model any more"


async def test_a_model_that_no_unit_serves_is_not_found(setup: Setup) -> None:
    with pytest.raises(ModelNotFound, match=r"^model: 'x' is not served by any unit; served: m, n$"):
        setup.choose(model="x")


async def test_a_model_that_is_removed_from_a_unit_is_served_by_the_other(setup: Setup) -> None:
    del setup.link("a").models["m"]
    assert setup.choose() == "b"


async def test_queued_requests_are_counted_over_all_units(setup: Setup) -> None:
    await setup.wait_on("a", "m", 2)
    await setup.wait_on("b", "m", 3)
    await setup.wait_on("a", "n")
    assert (setup.units.num_queued("m"), setup.units.num_queued("n"), setup.units.num_queued("x")) == (5, 1, 0)


async def test_the_demand_follows_the_unit_s_own_block_size_and_reserve(setup: Setup) -> None:
    on_a, on_b = (demand(setup.link(name), REQUEST) for name in "ab")
    assert (on_a.num_tokens, on_b.num_tokens) == (120, 320), "20 of the prompt, and at most 300 of the output"
    assert on_a.max_tokens == on_b.max_tokens == 320
    assert (len(on_a.block_hashes), len(on_b.block_hashes)) == (2, 1)
    assert on_a.block_hashes == block_hashes(REQUEST.prompt_token_ids, 8, IDENTITY.root("t", "s"))


async def test_hashes_are_of_the_weights_that_the_unit_has(setup: Setup) -> None:
    link, prompt = setup.link("a"), REQUEST.prompt_token_ids
    link.admission.fingerprints = {"m": "others", "n": IDENTITY.weights}
    root = replace(IDENTITY, weights="others").root("t", "s")
    assert demand(link, REQUEST).block_hashes == block_hashes(prompt, 8, root)


async def test_before_the_unit_has_told_its_weights_nothing_is_found_in_its_cache(setup: Setup) -> None:
    link = setup.link("a")
    link.admission.fingerprints = {}
    assert demand(link, REQUEST).block_hashes == ()


async def test_a_request_for_a_model_of_another_unit_has_no_demand_here(setup: Setup) -> None:
    with pytest.raises(KeyError):
        demand(setup.link("b"), replace(REQUEST, model="n"))


async def test_each_unit_has_its_own_mean_work(setup: Setup) -> None:
    assert setup.link("a").expected_work is not setup.link("b").expected_work


async def test_sequences_with_credits_count_like_queued_ones(setup: Setup) -> None:
    for _ in range(2):
        setup.link("a").assigned.add("m", 0.0, 1.0)  # of which the unit has issued the credits
    assert setup.choose() == "b"
    await setup.wait_on("b", "m", 3)
    assert setup.choose() == "a"


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
    assert demand(link, predicted).num_tokens == 20 + 100, "kv_answer_tokens"
    placed = link.models["m"]
    link.models["m"] = replace(placed, config=placed.config.model_copy(update={"kv_reserve": "p90"}))
    assert demand(link, predicted).num_tokens == 20 + 121
    assert demand(link, replace(REQUEST, prediction=None)).num_tokens == 20 + 100, "there is no prediction"
    resumed = replace(predicted, resume_token_ids=tuple(range(100)))
    remaining = math.ceil(LengthPrediction(50.0, 120.4).remaining_tokens(100, 0.1))
    assert demand(link, resumed).num_tokens == 120 + remaining > 120 + 21
