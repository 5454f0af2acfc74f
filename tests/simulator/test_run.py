import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest

from loadtest.spec import parse_spec
from loadtest.workload import Body, Sketch
from muxmesh.config.schema import MeshConfig
from muxmesh.errors import ConfigError
from muxmesh.scheduling_policy import PolicyName
from muxmesh.step_cost import StepCost
from muxmesh.types import LengthPrediction
from router.unit_choice import Candidate
from simulator.forecasts import ForecastInput, TrueLengths
from simulator.run import requests_of, true_length
from simulator.simulated_unit import Decision
from simulator.step_times import LinearStepTimes, linear_slowdown
from simulator.timeline import Delays
from tests.support.simulations import STEP_S, make_sketch, random_sketches, run_simulation, sim_mesh, sim_model


class EqualLengths(TrueLengths):
    """Forecasts the same length for every output, and records its calls."""

    def __init__(self) -> None:
        self.asked: list[ForecastInput] = []
        self.observed: list[tuple[object, int, bool]] = []

    def forecast(self, request: ForecastInput) -> tuple[LengthPrediction, str, object]:
        self.asked.append(request)
        return LengthPrediction(50, 100), "same", len(self.asked)

    def observe(self, forecast: object, num_output: int, censored: bool) -> None:
        self.observed.append((forecast, num_output, censored))


def decided_order(sketches: Any, config: MeshConfig, **options: Any) -> list[int]:
    decisions: list[Decision] = []
    run_simulation(sketches, config, on_decision=decisions.append, **options)
    return [one.index for one in decisions]


def test_one_request_takes_its_steps() -> None:
    (record,) = run_simulation([make_sketch(0, 1.0, num_input=300, num_output=10)]).run.records
    assert record.ttft_s == pytest.approx(3 * STEP_S)  # 128 prompt tokens in a step
    assert record.e2el_s == pytest.approx((3 + 9) * STEP_S)
    assert (record.status, record.num_output, record.finish) == ("OK", 10, "LENGTH")
    assert (record.scheduled_s, record.sent_s) == (1.0, 1.0)


@pytest.mark.parametrize(("mode", "num_steps"), [("adbs", 5), ("roundrobin", 10)])
def test_a_prompt_is_computed_first_or_in_turns_with_decode_steps(mode: str, num_steps: int) -> None:
    sketches = [make_sketch(0, 0.0, num_output=101), make_sketch(1, 0.505, num_input=128 * 5)]
    first, second = run_simulation(sketches, sim_mesh(arbiter={"mode": mode})).run.records
    assert second.ttft_s == pytest.approx(num_steps * STEP_S, abs=STEP_S)
    assert first.e2el_s == pytest.approx((101 + 5) * STEP_S)


def test_a_growing_context_adds_to_the_time_of_each_step() -> None:
    config = sim_mesh(sim_model(sim={"base_s": 0.0, "per_token_s": 0.001, "per_context_s": 0.0001}))
    (record,) = run_simulation([make_sketch(0, 0.0, num_input=5, num_output=41)], config).run.records
    decode_s = sum(0.001 + 0.0001 * (5 + step) for step in range(40))
    assert record.e2el_s - record.ttft_s == pytest.approx(decode_s)


@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_every_request_is_served_once_under_every_policy(policy: PolicyName) -> None:
    sketches = random_sketches(300, rate=40)
    result = run_simulation(sketches, policy=policy)
    assert all(record.is_ok for record in result.run.records)
    assert [record.num_output for record in result.run.records] == [true_length(one) for one in sketches]


def test_slots_are_never_exceeded() -> None:
    records = run_simulation(random_sketches(200, rate=100), sim_mesh(sim_model(slots=3))).run.records
    changes = sorted([(one.pieces[0][0], 1) for one in records] + [(one.ended_s or 0.0, -1) for one in records])
    assert max(itertools.accumulate(change for _, change in changes)) <= 3


def test_the_result_has_the_duration_the_events_and_the_busy_time() -> None:
    result = run_simulation([make_sketch(0, 0.0, num_output=5), make_sketch(1, 3.0, num_output=2)])
    assert result.run.duration_s == pytest.approx(3 + 2 * STEP_S) and not result.run.token_times
    assert result.busy_s == {"unit0": pytest.approx(7 * STEP_S)}
    assert result.num_requeued == 0 and result.num_events >= 4


def test_the_same_seed_gives_the_same_run() -> None:
    runs = [[one.ended_s for one in run_simulation(random_sketches(100, 30)).run.records] for _ in range(2)]
    assert runs[0] == runs[1]


def test_delays_make_every_request_slower() -> None:
    fast = run_simulation(random_sketches(30, 10)).run.records
    slow = run_simulation(random_sketches(30, 10), delays=Delays(step_s=0.002)).run.records
    assert all(one.e2el_s > other.e2el_s for one, other in zip(slow, fast, strict=True))


# Order


def test_the_shortest_request_goes_first_when_lengths_are_known() -> None:
    sketches = [make_sketch(0, 0.0, num_output=100)]
    sketches += [make_sketch(index, 0.001 * index, num_output=10 * (6 - index)) for index in range(1, 6)]
    decisions: list[Decision] = []
    run_simulation(sketches, sim_mesh(sim_model(slots=1), policy="srtf"), on_decision=decisions.append)
    assert [one.index for one in decisions] == [0, 5, 4, 3, 2, 1]
    assert [one.num_overtaken for one in decisions] == [0, 4, 3, 2, 1, 0]
    assert decisions[1].reason.startswith("srtf, priority 0: ")


def test_a_policy_that_is_given_replaces_the_configured_one() -> None:
    sketches = [make_sketch(0, 0.0, num_output=100), make_sketch(1, 0.1, num_output=50), make_sketch(2, 0.2)]
    config = sim_mesh(sim_model(slots=1), policy="srtf")
    assert decided_order(sketches, config) == [0, 2, 1]
    assert decided_order(sketches, config, policy="fcfs") == [0, 1, 2]


def test_a_lower_priority_value_goes_first() -> None:
    sketches = [make_sketch(0, 0.0, num_output=100), make_sketch(1, 0.1, num_output=90)]
    sketches.append(make_sketch(2, 0.2, num_output=90, priority=-1))
    assert decided_order(sketches, sim_mesh(sim_model(slots=1), policy="srtf-aged")) == [0, 2, 1]


def test_hrrn_with_equal_work_decides_exactly_as_fcfs() -> None:
    rng = random.Random(1)
    sketches = [make_sketch(0, 0.0, num_output=100), make_sketch(1, 2.0)]  # step costs are known from here on
    sketches += [
        make_sketch(index, 3 + 0.01 * index, 20, rng.randint(1, 99), max_new_tokens=200) for index in range(2, 200)
    ]
    policies: tuple[PolicyName, ...] = ("fcfs", "hrrn")
    orders = [decided_order(sketches, sim_mesh(), forecasts=EqualLengths(), policy=policy) for policy in policies]
    assert orders[0] == orders[1] == list(range(200))


# Router


@pytest.mark.parametrize(
    ("num_input", "error"),
    [
        (5000, "prompt: is 5000 tokens; the context holds 4096, at least 1 for the output"),
        (4096, "prompt: is 4096 tokens; the context holds 4096"),
        (4090, "stopping.max_new_tokens: "),
    ],
)
def test_a_request_that_never_fits_is_refused_and_the_rest_is_served(num_input: int, error: str) -> None:
    refused, served = run_simulation([make_sketch(0, 1.0, num_input), make_sketch(1, 1.0)]).run.records
    assert (refused.status, refused.ended_s, refused.pieces) == ("INVALID_ARGUMENT", 1.0, [])
    assert refused.error.startswith(error) and served.is_ok


def test_requests_beyond_the_waiting_limit_are_refused() -> None:
    config = sim_mesh(sim_model(slots=1))
    config = config.model_copy(update={"router": config.router.model_copy(update={"max_waiting_requests": 2})})
    records = run_simulation([make_sketch(index, 0.0) for index in range(5)], config).run.records
    assert [one.status for one in records] == ["OK"] * 3 + ["RESOURCE_EXHAUSTED"] * 2
    assert "at most 2 may wait" in records[-1].error


def test_a_request_goes_to_the_unit_with_the_fewest_sequences_of_its_model() -> None:
    result = run_simulation(
        [make_sketch(index, 0.0, num_output=11) for index in range(5)], sim_mesh(sim_model(slots=1), num_units=2)
    )
    assert [one.e2el_s for one in result.run.records] == pytest.approx([0.11, 0.11, 0.22, 0.22, 0.33], abs=1e-9)
    assert result.busy_s == {"unit0": pytest.approx(0.33), "unit1": pytest.approx(0.22)}


def test_forecasts_are_asked_at_arrival_and_learn_whole_outputs() -> None:
    forecasts = EqualLengths()
    sketches = [
        make_sketch(0, 0.0, body=Body("hello", 3, 7), max_new_tokens=20, tenant="t"),
        make_sketch(1, 1.0, num_output=30, max_new_tokens=20),
        make_sketch(2, 2.0, num_input=5000),
    ]
    run_simulation(sketches, forecasts=forecasts)
    assert forecasts.asked == [ForecastInput("hello", "m", "t", 7), ForecastInput(None, "m", "", 20)]
    assert forecasts.observed == [(1, 7, False), (2, 20, True)]


def test_a_request_goes_to_the_unit_that_caches_its_prompt_unless_another_starts_it_sooner() -> None:
    def turn(index: int, at_s: float) -> Sketch:
        return make_sketch(index, at_s, 1024, body=Body(None, 1024, 10, hash_ids=(7, 8)))

    config = sim_mesh(sim_model(slots=1), num_units=2)
    apart = run_simulation([turn(index, 10.0 * index) for index in range(4)], config)
    assert apart.busy_s["unit1"] == 0.0, "one unit has the prompt"
    assert [one.num_cached for one in apart.run.records] == [0, 1008, 1008, 1008], "the last token is computed"
    together = run_simulation([turn(index, 10.0) for index in range(2)], config)
    assert all(busy_s > 0 for busy_s in together.busy_s.values())


def test_a_router_knows_of_a_cached_prompt_after_a_delay() -> None:
    seen: list[tuple[int, ...]] = []

    def first(candidates: Sequence[Candidate], hashes: Sequence[bytes], turn: int) -> int:
        assert len(hashes) == 16
        seen.append(tuple(one.num_cached_tokens for one in candidates))
        return turn

    body = Body(None, 256, 1, hash_ids=(7,))
    sketches = [make_sketch(index, at_s, 256, 1, body=body) for index, at_s in enumerate((0.0, 0.5))]
    for delay_s in (0.1, 1.0):
        run_simulation(sketches, sim_mesh(num_units=2), choose_unit=first, residency_delay_s=delay_s)
    assert seen == [(0, 0), (255, 0), (0, 0), (0, 0)]


def test_forecasts_do_not_learn_from_a_request_that_the_unit_refuses() -> None:
    forecasts = EqualLengths()
    config = sim_mesh(pool="1MiB", slab="1MiB")
    (record,) = run_simulation([make_sketch(0, 0.0, num_input=3000)], config, forecasts).run.records
    assert record.status == "INVALID_ARGUMENT" and "KV pool" in record.error
    assert len(forecasts.asked) == 1 and forecasts.observed == []


@pytest.mark.parametrize(
    ("num_output", "max_new_tokens", "expected"), [(7, 20, 7), (30, 20, 20), (0, 20, 1), (None, 5, 1)]
)
def test_the_true_length_is_within_the_limit_and_at_least_one(
    num_output: int | None, max_new_tokens: int, expected: int
) -> None:
    assert true_length(make_sketch(0, 0.0, body=Body("x", 1, num_output), max_new_tokens=max_new_tokens)) == expected


@pytest.mark.parametrize(
    ("body", "num_tokens"),
    [(Body("x" * 41, 0, 1), 11), (Body("x" * 41, 7, 1), 7), (Body("", 0, 1), 1), (Body(None, 0, 1), 1)],
    ids=["text", "counted text", "empty text", "no tokens"],
)
def test_an_uncounted_text_has_a_token_for_every_four_bytes(body: Body, num_tokens: int) -> None:
    (record,) = run_simulation([make_sketch(0, 0.0, body=body)]).run.records
    assert record.num_input == num_tokens


TEXT = "the same text again and again " * 40
BODIES = {
    "equal texts": (Body(TEXT, 0, 5), Body(TEXT, 0, 5), 288),
    "other texts": (Body(TEXT, 0, 5), Body(TEXT + "!", 0, 5), 0),
    "equal hash ids": (Body(None, 1100, 5, (7, 8)), Body(None, 1100, 5, (7, 8)), 1024),
    "equal first hash ids": (Body(None, 1100, 5, (7, 8)), Body(None, 1100, 5, (7, 9)), 512),
    "other first hash ids": (Body(None, 1100, 5, (6, 8)), Body(None, 1100, 5, (7, 8)), 0),
    "equal hash ids at other positions": (Body(None, 1100, 5, (7, 8)), Body(None, 1100, 5, (8, 7)), 0),
    "small hash blocks": (Body(None, 100, 5, (7, 8), 24), Body(None, 100, 5, (7, 8), 24), 48),
    "random prompts": (Body(None, 300, 5), Body(None, 300, 5), 0),
}


@pytest.mark.parametrize(("first", "second", "num_cached"), BODIES.values(), ids=BODIES.keys())
def test_prompts_share_the_cached_blocks_that_are_equal(first: Body, second: Body, num_cached: int) -> None:
    sketches = [make_sketch(0, 0.0, body=first, num_output=5), make_sketch(1, 5.0, body=second, num_output=5)]
    records = run_simulation(sketches).run.records
    assert [one.num_cached for one in records] == [0, num_cached]


def test_two_models_share_the_device_in_turns() -> None:
    config = sim_mesh(sim_model("a"), sim_model("b"))
    sketches = [make_sketch(index, 0.0, num_output=50, model=model) for index, model in enumerate("ab")]
    result = run_simulation(sketches, config)
    assert [r.e2el_s for r in result.run.records] == pytest.approx([99 * STEP_S, 100 * STEP_S], abs=2 * STEP_S)
    assert result.busy_s["unit0"] == pytest.approx(100 * STEP_S)


def test_models_with_shares_compute_at_the_same_time_and_slow_each_other_down() -> None:
    models = [sim_model(name, compute_share={"prefill": 60, "decode": 40}) for name in "ab"]
    sketches = [make_sketch(index, 0.0, num_output=50, model=model) for index, model in enumerate("ab")]
    alone, beside = (
        run_simulation(sketches, sim_mesh(*models), slowdown=linear_slowdown(contention)) for contention in (0.0, 0.5)
    )
    step_s = STEP_S / 0.4
    assert alone.run.records[1].e2el_s == pytest.approx(2 * STEP_S / 0.6 + 49 * step_s)  # one prefill after the other
    assert beside.run.records[1].e2el_s == pytest.approx(1.2 * 49 * step_s, rel=0.05)


def test_a_decode_that_is_about_to_miss_its_slo_goes_before_a_prompt() -> None:
    slow, fast = (
        run_simulation(
            [make_sketch(0, 0.0, num_output=60, model="a"), make_sketch(1, 0.1, num_input=4000, model="b")],
            sim_mesh(sim_model("a", slo=slo), sim_model("b"), arbiter={"urgent_slack_s": 0.012}),
        ).run.records
        for slo in (None, {"tpot_s": 1.5 * STEP_S})
    )
    assert slow[0].tpot_s is not None and slow[0].tpot_s > 0.02
    assert fast[0].tpot_s is not None and fast[0].tpot_s <= 0.016
    assert fast[1].ttft_s > slow[1].ttft_s


def test_step_times_can_be_given_for_a_model_of_a_unit() -> None:
    times = {("unit1", "m"): LinearStepTimes(StepCost(3 * STEP_S, 0.0, 0.0))}
    sketches = [make_sketch(index, 0.0, num_output=11) for index in range(2)]
    result = run_simulation(sketches, sim_mesh(num_units=2), times=times)
    assert [one.e2el_s for one in result.run.records] == pytest.approx([0.11, 0.33])


def test_a_model_that_is_not_served_is_named() -> None:
    with pytest.raises(ConfigError, match="models=other: not served; these are: a, b"):
        run_simulation([make_sketch(0, 0.0, model="other")], sim_mesh(sim_model("a"), sim_model("b")))


def test_a_request_without_a_model_needs_a_mesh_with_one_model() -> None:
    with pytest.raises(ConfigError, match="has to name one of: a, b"):
        run_simulation([make_sketch(0, 0.0)], sim_mesh(sim_model("a"), sim_model("b")))


def test_a_workload_without_output_lengths_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "hello"}\n')
    with pytest.raises(ConfigError, match=f"simulate: {path}: every line needs output_tokens"):
        requests_of(parse_spec(f"rate=1 requests=1 prompts={path} output=natural"))


def test_a_workload_with_output_lengths_is_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "hello", "n_out": 12}\n')
    (request,) = requests_of(parse_spec(f"rate=1 requests=1 prompts={path} output=natural"))
    assert (request.body.text, true_length(request)) == ("hello", 12)


@pytest.mark.parametrize(("tensor_parallel", "status"), [(1, "INVALID_ARGUMENT"), (4, "OK")])
def test_a_unit_on_several_devices_has_the_kv_memory_of_all(tensor_parallel: int, status: str) -> None:
    config = sim_mesh(sim_model(max_model_len=8192), pool="1MiB", slab="64KiB", tensor_parallel=tensor_parallel)
    (record,) = run_simulation([make_sketch(0, 0.0, num_input=7000)], config).run.records
    assert record.status == status
