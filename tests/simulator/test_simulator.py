import itertools
import random
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from loadtest.spec import parse_spec
from loadtest.workload import Body, Sketch
from muxmesh.config.schema import MeshConfig
from muxmesh.errors import ConfigError
from muxmesh.models.model_spec import SIM_SPEC
from muxmesh.predictor.rank_correlation import kendall_tau
from muxmesh.scheduling_policy import FCFS, PolicyName
from muxmesh.step_cost import StepCost
from muxmesh.types import LengthPrediction, SchedulingState
from simulator.forecasts import Asked, Forecasts, Known, Noisy
from simulator.run import Simulated, requests_of, simulate, true_length
from simulator.simulated_device import DecodeJob, DecodeWorker, Device, PrefillJob, PrefillWorker
from simulator.simulated_unit import Decision
from simulator.timeline import Timeline

STEP_S = 0.01
COST = StepCost(STEP_S, 0.0, 0.0)


def mesh(order: str = "fcfs", slots: int = 4, **fields: object) -> MeshConfig:
    model = {"name": "m", "engine": "sim", "max_num_seqs": slots, "max_model_len": 4096,
             "sim": {"base_s": STEP_S}, **fields}  # fmt: skip
    return MeshConfig.model_validate({"order": {"policy": order}, "units": [{"kv_pool": "64MiB", "models": [model]}]})


def sketch(index: int, at_s: float, num_input: int = 10, num_output: int = 10, **fields: object) -> Sketch:
    given = {"max_new_tokens": num_output, "is_forced": True, "seed": 0, "model": None, "tenant": None, "priority": 0}
    return Sketch(index=index, at_s=at_s, body=Body(None, num_input, num_output), **given | fields)  # type: ignore[arg-type]


def run(
    sketches: list[Sketch], config: MeshConfig | None = None, forecasts: Forecasts | None = None, **more: object
) -> Simulated:
    return simulate(config or mesh(), {"m": SIM_SPEC}, sketches, forecasts or Known(), **more)  # type: ignore[arg-type]


def random_sketches(count: int, rate: float, seed: int = 0) -> list[Sketch]:
    rng = random.Random(seed)
    times = itertools.accumulate(rng.expovariate(rate) for _ in range(count))
    return [sketch(i, at_s, rng.randint(1, 300), rng.randint(1, 80)) for i, at_s in enumerate(times)]


def test_one_request_takes_its_steps() -> None:
    (record,) = run([sketch(0, 1.0, num_input=300, num_output=10)]).run.records
    assert record.ttft_s == pytest.approx(3 * STEP_S)  # 128 prompt tokens in a step
    assert record.e2el_s == pytest.approx((3 + 9) * STEP_S)
    assert (record.status, record.num_output, record.finish) == ("OK", 10, "LENGTH")


def test_prefill_and_decode_take_turns() -> None:
    first, second = run([sketch(0, 0.0, num_output=101), sketch(1, 0.5, num_input=128 * 5)]).run.records
    assert second.ttft_s == pytest.approx(10 * STEP_S, abs=STEP_S)  # five steps, each after one of the other's
    assert first.e2el_s == pytest.approx((101 + 5) * STEP_S)


def test_a_stretch_of_steps_is_cut_at_the_end_of_the_step_in_which_work_comes() -> None:
    _, second = run([sketch(0, 0.0, num_output=1000), sketch(1, 0.505)]).run.records
    assert second.pieces[0][0] == pytest.approx(0.51 + STEP_S)


def test_a_growing_context_adds_up() -> None:
    config = mesh(sim={"base_s": 0.0, "per_token_s": 0.001, "per_context_s": 0.0001})
    (record,) = run([sketch(0, 0.0, num_input=5, num_output=41)], config).run.records
    decode_s = sum(0.001 + 0.0001 * (5 + step) for step in range(40))
    assert record.e2el_s - record.ttft_s == pytest.approx(decode_s)


@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_every_request_is_served_once_whatever_the_order(policy: PolicyName) -> None:
    sketches = random_sketches(300, rate=40)
    simulated = run(sketches, policy=policy)
    assert all(record.is_ok for record in simulated.run.records)
    assert [r.num_output for r in simulated.run.records] == [true_length(one) for one in sketches]


def test_slots_are_never_more_than_configured() -> None:
    records = run(random_sketches(200, rate=100), mesh(slots=3)).run.records
    changes = sorted([(r.pieces[0][0], 1) for r in records] + [(r.ended_s or 0.0, -1) for r in records])
    assert max(itertools.accumulate(change for _, change in changes)) <= 3


def test_the_shortest_goes_first_when_lengths_are_known() -> None:
    sketches = [sketch(0, 0.0, num_output=100), *(sketch(i, 0.001 * i, num_output=10 * (6 - i)) for i in range(1, 6))]
    decided: list[Decision] = []
    run(sketches, mesh("srtf", slots=1), on_decision=decided.append)
    assert [one.index for one in decided] == [0, 5, 4, 3, 2, 1]
    assert [one.num_overtaken for one in decided] == [0, 4, 3, 2, 1, 0]
    assert decided[1].reason.startswith("srtf, priority 0: ")


class Same(Known):
    """Everything is expected to take as long as everything else."""

    def ask(self, asked: Asked) -> tuple[LengthPrediction, str, object]:
        """See `Forecasts`."""
        return LengthPrediction(50, 100), "same", None


def test_hrrn_with_equal_work_decides_exactly_as_fcfs() -> None:
    rng = random.Random(1)
    warm_up = [sketch(0, 0.0, num_output=100), sketch(1, 2.0)]  # from here on the router knows what steps take
    burst = [sketch(i, 3 + 0.01 * i, 20, rng.randint(1, 99), max_new_tokens=200) for i in range(2, 200)]
    orders: list[list[int]] = []
    both: tuple[PolicyName, ...] = ("fcfs", "hrrn")
    for policy in both:
        decided: list[Decision] = []
        run([*warm_up, *burst], forecasts=Same(), policy=policy, on_decision=decided.append)
        orders.append([one.index for one in decided])
    assert orders[0] == orders[1] == list(range(200))


def test_a_full_pool_makes_answers_give_way_and_loses_nothing() -> None:
    config = MeshConfig.model_validate({
        "units": [{"kv_pool": "1MiB", "slab": "1MiB", "models": [
            {"name": "m", "engine": "sim", "max_num_seqs": 64, "kv_answer_tokens": 1, "sim": {"base_s": STEP_S},
             "max_model_len": 4096}]}]
    })  # fmt: skip
    capacity = SIM_SPEC.kv_shape(16, "float32").token_block_bytes
    num_output = 2**20 // capacity * 16 // 8  # eight of them fill the pool
    sketches = [sketch(i, 0.0, 16, min(num_output, 3000)) for i in range(24)]
    simulated = run(sketches, config)
    assert all(record.is_ok for record in simulated.run.records)
    assert simulated.num_requeued > 0


def test_a_loan_comes_back_to_the_model_that_it_was_guaranteed_to() -> None:
    """One model fills the pool; the other comes, and answers of the first give way after a while."""
    models = [
        {"name": name, "engine": "sim", "max_num_seqs": 64, "kv_answer_tokens": 3000, "sim": {"base_s": STEP_S},
         "max_model_len": 4096, **more}
        for name, more in (("lent", {}), ("owner", {"kv_guaranteed": "1MiB"}))
    ]  # fmt: skip
    config = MeshConfig.model_validate({"units": [{"kv_pool": "2MiB", "slab": "1MiB", "models": models}]})
    sketches = [sketch(index, 0.0, 16, 3000, model="lent") for index in range(64)]
    sketches.append(sketch(64, 5.0, 16, 200, model="owner"))
    simulated = simulate(config, dict.fromkeys(("lent", "owner"), SIM_SPEC), sketches, Known())
    assert all(record.is_ok for record in simulated.run.records)
    owner = simulated.run.records[64]
    assert 1.0 < owner.ttft_s < 3.0 and simulated.num_requeued > 0


def test_what_can_never_fit_is_refused_and_the_rest_is_served() -> None:
    records = run([sketch(0, 0.0, num_input=5000), sketch(1, 0.0)]).run.records
    assert [record.status for record in records] == ["INVALID_ARGUMENT", "OK"]


def test_a_repeated_prompt_is_found_in_the_prefix_cache() -> None:
    body = Body("the same text again and again " * 40, 0, 5)
    sketches = [Sketch(i, float(i), body, 5, True, 0, None, None, 0) for i in range(2)]
    first, second = run(sketches).run.records
    assert first.num_cached == 0 and (second.num_cached or 0) > 200
    assert second.ttft_s < first.ttft_s


def test_priority_goes_first() -> None:
    sketches = [sketch(0, 0.0, num_output=100), sketch(1, 0.1), sketch(2, 0.2, priority=-1)]
    decided: list[Decision] = []
    run(sketches, mesh("srtf-aged", slots=1), on_decision=decided.append)
    assert [one.index for one in decided] == [0, 2, 1]


def test_two_models_share_the_device_in_turn() -> None:
    models = [{"name": name, "engine": "sim", "sim": {"base_s": STEP_S}} for name in "ab"]
    config = MeshConfig.model_validate({"units": [{"models": models}]})
    sketches = [sketch(0, 0.0, num_output=50, model="a"), sketch(1, 0.0, num_output=50, model="b")]
    simulated = simulate(config, dict.fromkeys("ab", SIM_SPEC), sketches, Known())
    assert [r.e2el_s for r in simulated.run.records] == pytest.approx([99 * STEP_S, 100 * STEP_S], abs=2 * STEP_S)
    assert simulated.busy_s["unit0"] == pytest.approx(100 * STEP_S)


def test_a_model_that_is_not_served_is_named() -> None:
    with pytest.raises(ConfigError, match="not served"):
        run([sketch(0, 0.0, model="other")])


def test_a_workload_without_lengths_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "hello"}\n')
    with pytest.raises(ConfigError, match="n_out"):
        requests_of(parse_spec(f"rate=1 requests=1 prompts={path} output=natural"))


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.6, 1.0])
def test_injected_errors_rank_as_they_are_told_to(tau: float) -> None:
    rng = random.Random(1)
    lengths = [max(1, round(rng.lognormvariate(5, 1))) for _ in range(1500)]
    noisy = Noisy(tau, lengths, seed=2)
    said = [noisy.ask(Asked(None, "m", "", length))[0].p50_tokens for length in lengths]
    assert kendall_tau(np.array(said), np.array(lengths, float)) == pytest.approx(tau, abs=0.04)


def test_the_same_seed_gives_the_same_run() -> None:
    runs = [[r.ended_s for r in run(random_sketches(100, 30)).run.records] for _ in range(2)]
    assert runs[0] == runs[1]


def stepwise(cost: StepCost, jobs: list[tuple[float, int, int]]) -> list[float]:
    """When jobs (arrival, context, tokens) end on one decode worker, one step after the other."""
    now_s, left, ends = 0.0, [count for *_, count in jobs], [0.0] * len(jobs)
    done = [0] * len(jobs)
    while any(left):
        batch = [i for i, (at_s, *_) in enumerate(jobs) if at_s <= now_s + 1e-12 and left[i]]
        if not batch:
            now_s = min(at_s for i, (at_s, *_) in enumerate(jobs) if left[i])
            continue
        now_s += cost.step_s(len(batch), sum(jobs[i][1] + done[i] for i in batch))
        for i in batch:
            left[i] -= 1
            done[i] += 1
            ends[i] = now_s if not left[i] else ends[i]
    return ends


def test_stretches_of_steps_take_what_single_steps_take() -> None:
    cost, rng = StepCost(0.003, 0.0007, 1e-6), random.Random(4)
    jobs = sorted((rng.uniform(0, 2), rng.randint(1, 500), rng.randint(1, 120)) for _ in range(40))
    timeline, worker, ends = Timeline(), DecodeWorker(cost), [0.0] * len(jobs)
    device = Device(timeline, [worker])

    def ended(place: int) -> None:
        ends[place] = timeline.now_s

    def come(place: int) -> None:
        _, context, count = jobs[place]
        worker.add(DecodeJob(context, count, lambda: ended(place), lambda: None, lambda: None))
        device.wake()

    for place, (at_s, *_) in enumerate(jobs):
        timeline.at(at_s, lambda place=place: come(place))  # type: ignore[misc]
    timeline.run()
    assert ends == pytest.approx(stepwise(cost, jobs))
    assert timeline.num_events < sum(count for *_, count in jobs)


def test_a_prefill_step_is_shared_out_as_the_engine_does() -> None:
    worker, done = PrefillWorker(COST, FCFS, token_budget=100, max_num_seqs=8), list[str]()
    for name, count in (("a", 60), ("b", 60), ("c", 10)):
        worker.add(PrefillJob(SchedulingState(0, ord(name)), 0, count, lambda name=name: done.append(name)))  # type: ignore[misc]
    worker.begin(0.0)
    worker.end(1)
    assert done == ["a"]
    worker.begin(0.0)
    worker.end(1)
    assert done == ["a", "b", "c"] and not worker.has_work()
