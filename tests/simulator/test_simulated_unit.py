import itertools
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.model_states import PATIENCE_S
from muxmesh.scheduling_policy import FCFS, SchedulingPolicy
from muxmesh.types import ArbiterMode
from simulator.simulated_request import SimulatedRequest
from simulator.timeline import Delays
from simulator.unit_use import ModelSwitches
from tests.support.simulations import STEP_S, sim_mesh, sim_model
from tests.support.unit_bench import TOKENS_PER_MIB, Bench

SRTF = SchedulingPolicy("srtf", 0.0, 0.0, 1.0)


def test_a_request_takes_its_prefill_steps_and_a_step_for_each_further_token() -> None:
    bench = Bench()
    request = bench.request_at(1.0, num_prompt=300, num_output=10)  # 128 prompt tokens in a step
    bench.run()
    record = request.record
    assert [count for _, count in record.pieces] == [1, 9]
    assert [at_s for at_s, _ in record.pieces] == pytest.approx([1 + 3 * STEP_S, 1 + 12 * STEP_S])
    assert record.ended_s == record.pieces[-1][0]
    assert (record.status, record.num_input, record.num_output, record.num_cached) == ("OK", 300, 10, 0)


def test_an_output_of_one_token_ends_with_its_prefill() -> None:
    bench = Bench()
    request = bench.request_at(0.0, num_output=1)
    bench.run()
    assert request.record.pieces == [(STEP_S, 1)] and request.record.ended_s == STEP_S


@pytest.mark.parametrize(("max_new_tokens", "finish"), [(10, "LENGTH"), (11, "EOS")])
def test_an_output_that_reaches_its_limit_finishes_by_length(max_new_tokens: int, finish: str) -> None:
    bench = Bench()
    request = bench.request_at(0.0, num_output=10, max_new_tokens=max_new_tokens)
    bench.run()
    assert request.record.finish == finish


@pytest.mark.parametrize(
    ("delays", "ttft_s", "e2el_s"),
    [
        (Delays(admit_s=0.5), 0.51, 0.60),
        (Delays(hand_off_s=0.5), 0.01, 0.60),
        (Delays(end_s=0.5), 0.01, 0.10),
        (Delays(step_s=0.5), 0.51, 5.10),
        (Delays(turn_s=0.5), 0.51, 1.10),
    ],
    ids=["admit", "hand-off", "end", "step", "turn"],
)
def test_a_delay_is_added_in_its_place(delays: Delays, ttft_s: float, e2el_s: float) -> None:
    bench = Bench(delays=delays)
    record = bench.request_at(0.0, num_output=10).record
    bench.run()
    assert [record.ttft_s, record.e2el_s] == pytest.approx([ttft_s, e2el_s])


def test_a_slot_is_free_only_after_the_end_delay() -> None:
    bench = Bench(sim_mesh(sim_model(slots=1)), delays=Delays(end_s=0.5))
    bench.request_at(0.0, num_output=1)
    second = bench.request_at(0.0, num_output=1)
    bench.run()
    assert second.record.ttft_s == pytest.approx(STEP_S + 0.5 + STEP_S)


def test_requests_without_a_slot_wait_in_the_queue() -> None:
    bench, waiting = Bench(sim_mesh(sim_model(slots=2))), list[tuple[int, int]]()
    for _ in range(5):
        bench.request_at(0.0, num_output=10)
    bench.timeline.at(0.05, lambda: waiting.append((bench.unit.num_waiting, bench.unit.num_queued("m"))))
    bench.run()
    assert waiting == [(3, 3)] and bench.unit.num_queued("other") == 0


def test_more_requests_than_a_unit_is_shown_at_once_are_all_served() -> None:
    bench = Bench(sim_mesh(sim_model(slots=2)))
    for index in range(150):
        bench.request_at(0.0, num_output=1 + index % 3)
    bench.run()
    assert all(record.is_ok for record in bench.records)


def test_decisions_are_numbered_and_give_a_reason() -> None:
    bench = Bench(sim_mesh(sim_model(slots=1)), policy=SRTF)
    bench.request_at(0.0, num_output=20)
    bench.request_at(0.01, work_s=3.0)
    bench.request_at(0.02, work_s=1.0)
    bench.run()
    assert [(one.number, one.index, one.num_overtaken) for one in bench.decisions] == [(1, 0, 0), (2, 2, 1), (3, 1, 0)]
    assert bench.decisions[1].reason.startswith("srtf, priority 0: 1 s") and bench.decisions[1].model == "m"
    assert bench.decisions[1].at_s == pytest.approx(0.2)


def test_a_lower_priority_value_is_admitted_first() -> None:
    bench = Bench(sim_mesh(sim_model(slots=1, max_paused_seqs=0)))
    for priority in (0, 0, -1):
        bench.request_at(0.01 * len(bench.requests), priority=priority)
    bench.run()
    assert bench.ended == [0, 2, 1]


def test_a_better_class_pre_empts_a_full_batch_and_its_victim_loses_no_token() -> None:
    bench = Bench(sim_mesh(sim_model(slots=1)))
    long = bench.request_at(0.0, num_output=200)
    urgent = bench.request_at(0.5, num_output=10, priority=-1)
    bench.run()
    assert bench.ended == [1, 0]
    assert urgent.record.e2el_s == pytest.approx(10 * STEP_S, abs=3 * STEP_S), "it waits for no slot"
    assert sum(count for _, count in long.record.pieces) == 200
    assert long.record.e2el_s == pytest.approx(210 * STEP_S, abs=3 * STEP_S)


@pytest.mark.parametrize(("num_prompt", "mode"), [(10, "auto"), (300, "adbs")])
@pytest.mark.parametrize("slots", [1, 16])
@pytest.mark.parametrize("at_s", [1.0, 1.003, 1.0099])
def test_a_better_class_starts_within_two_decode_steps_and_its_prefill(
    slots: int, num_prompt: int, mode: ArbiterMode, at_s: float
) -> None:
    """``auto`` of one model is ``roundrobin``, where the chunks of a long prompt take turns with decode steps."""
    bench = Bench(sim_mesh(sim_model(slots=slots), arbiter={"mode": mode}))
    for _ in range(slots):
        bench.request_at(0.0, num_output=400)
    urgent = bench.request_at(at_s, num_prompt, num_output=2, priority=-1)
    bench.run()
    assert bench.ended[0] == urgent.index, "the batch was full all the time"
    num_prefill_steps = -(-num_prompt // 128)
    assert urgent.record.ttft_s <= (2 + num_prefill_steps) * STEP_S + 1e-9
    assert urgent.record.e2el_s <= (4 + num_prefill_steps) * STEP_S + 1e-9, "the next token is as soon"


def test_a_short_request_pre_empts_a_long_one_and_a_long_one_does_not() -> None:
    bench = Bench(sim_mesh(sim_model(slots=1)), policy=SRTF)
    for at_s, num_output in ((0.0, 200), (0.5, 190), (0.6, 10)):
        bench.request_at(at_s, num_output=num_output, work_s=num_output * STEP_S)
    bench.run()
    assert bench.ended == [2, 0, 1]


def starving_requests(bench: Bench) -> list[SimulatedRequest]:
    """Three requests behind 1,000 of a better class, of which some are always queued, but none for long."""
    for number in range(1000):
        bench.request_at(max(0.0, 0.055 * (number - 25)), num_output=10, priority=-1)
    return [bench.request_at(3.0 + number, num_output=50) for number in range(3)]


def test_a_thousand_better_requests_in_a_row_starve_nobody_past_the_bound() -> None:
    bench = Bench(sim_mesh(sim_model(slots=2)), policy=replace(FCFS, max_wait_s=5.0))
    starving = starving_requests(bench)
    bench.run()
    for request in starving:
        assert 5.0 < request.record.ttft_s <= 5.0 + 20 * STEP_S
        assert request.record.e2el_s <= 5.0 + (20 + 2 * 50) * STEP_S
    assert max(record.ttft_s for record in bench.records[:1000]) < 5.0


def test_without_a_bound_better_requests_go_first_for_ever() -> None:
    bench = Bench(sim_mesh(sim_model(slots=2)))
    starving = starving_requests(bench)
    bench.run()
    assert min(request.record.ttft_s for request in starving) > 30.0


def test_a_request_that_never_fits_the_pool_ends_with_an_error_and_the_others_are_served() -> None:
    bench = Bench(sim_mesh(sim_model(), pool="1MiB", slab="1MiB"))
    too_long = bench.request_at(0.0, num_prompt=TOKENS_PER_MIB + 1)
    other = bench.request_at(0.0)
    bench.run()
    assert too_long.record.status == "INVALID_ARGUMENT" and too_long.record.ended_s == 0.0
    assert too_long.record.error.startswith("stopping.max_new_tokens: ") and "KV pool" in too_long.record.error
    assert other.record.is_ok and bench.decisions[0].index == other.index


def test_a_prompt_with_known_blocks_is_computed_from_the_first_unknown_one() -> None:
    bench, hashes = Bench(), tuple(bytes([number]) * 16 for number in range(20))
    first = bench.request_at(0.0, num_prompt=320, hashes=hashes)
    second = bench.request_at(5.0, num_prompt=320, hashes=hashes)
    third = bench.request_at(9.0, num_prompt=320, hashes=(*hashes[:7], *(one + b"other" for one in hashes[7:])))
    bench.run()
    # the last token is always computed, so the last block is not taken from the cache
    assert [one.record.num_cached for one in (first, second, third)] == [0, 19 * 16, 7 * 16]
    assert second.record.ttft_s == pytest.approx(STEP_S) and first.record.ttft_s == pytest.approx(3 * STEP_S)


def test_a_request_without_hashes_shares_no_blocks() -> None:
    bench = Bench()
    for index in range(3):
        bench.request_at(float(index), num_prompt=320)
    bench.run()
    assert [record.num_cached for record in bench.records] == [0, 0, 0]


def test_step_costs_are_reported_after_both_workers_have_run() -> None:
    bench = Bench()
    before = bench.unit.service("m")
    bench.request_at(0.0, num_output=20)
    bench.request_at(5.0)
    bench.run()
    costs = bench.unit.service("m").costs
    assert (before.model, before.costs, before.step_token_budget) == ("m", None, 128)
    assert costs is not None and costs.prefill.step_s(1, 0) == pytest.approx(STEP_S)
    assert costs.decode.step_s(1, 10) == pytest.approx(STEP_S, rel=0.01)


def test_the_device_is_busy_for_the_steps_of_all_models() -> None:
    bench = Bench(sim_mesh(sim_model("a"), sim_model("b")))
    for model in "ab":
        bench.request_at(0.0, num_output=50, model=model)
    bench.run()
    assert bench.unit.use.busy_s == pytest.approx(100 * STEP_S)
    assert [record.e2el_s for record in bench.records] == pytest.approx([99 * STEP_S, 100 * STEP_S], abs=2 * STEP_S)


def test_a_model_that_sleeps_wakes_for_its_request_and_the_idle_one_falls_asleep() -> None:
    models = [sim_model(name) for name in "ab"]
    bench = Bench(sim_mesh(*models, max_awake_models=1), delays=Delays(sleep_s=0.25, wake_s=0.5, load_s=2.0))
    for at_s, model in ((0.0, "a"), (5.0, "b"), (10.0, "b"), (15.0, "a")):
        bench.request_at(at_s, model=model)
    bench.run()
    ttfts_s = [record.ttft_s for record in bench.records]
    assert ttfts_s == pytest.approx([STEP_S, 2.25 + STEP_S, STEP_S, 0.75 + STEP_S])  # b had never been awake
    assert bench.unit.use.switches == {"a": ModelSwitches(1, 0.5), "b": ModelSwitches(1, 2.0)}


def test_a_busy_model_lets_another_one_wake_after_a_while() -> None:
    models = [sim_model(name, slots=1) for name in "ab"]
    bench = Bench(sim_mesh(*models, max_awake_models=1), delays=Delays(wake_s=0.5))
    for _ in range(40):
        bench.request_at(0.0, num_output=100, model="a")
    bench.request_at(1.0, model="b")
    bench.run()
    assert PATIENCE_S < bench.records[-1].ttft_s < PATIENCE_S + 2.5


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.floats(0, 2), st.integers(1, 400), st.integers(1, 400), st.integers(-1, 1)),
        min_size=1,
        max_size=15,
    )
)
def test_every_request_ends_once_and_the_slots_are_never_exceeded(
    requests: list[tuple[float, int, int, int]],
) -> None:
    config = sim_mesh(sim_model(slots=3, kv_answer_tokens=16, max_paused_seqs=2), pool="1MiB", slab="1MiB")
    bench = Bench(config, delays=Delays(admit_s=0.003, hand_off_s=0.002, end_s=0.001))
    for at_s, num_prompt, num_output, priority in requests:
        bench.request_at(at_s, num_prompt, num_output, priority=priority)
    bench.run()
    assert all(sum(count for _, count in record.pieces) == record.num_output for record in bench.records)
    changes = [(one.at_s, 1, 1) for one in bench.decisions]
    changes += [(record.ended_s or 0.0, 0, -1) for record in bench.records]
    if bench.unit.use.num_requeued == 0:
        assert max(itertools.accumulate(change for *_, change in sorted(changes))) <= 3 + 2


MODELS = st.lists(
    st.fixed_dictionaries(
        {
            "slots": st.sampled_from([1, 3, 16]),
            "kv_answer_tokens": st.sampled_from([1, 200]),
            "compute_share": st.sampled_from([40, 100]),
            "slo": st.sampled_from([None, {"scale": 2}, {"ttft_s": 0.5, "tpot_s": 0.02}]),
        }
    ),
    min_size=2,
    max_size=3,
)
UNITS = st.fixed_dictionaries(
    {
        "arbiter": st.fixed_dictionaries({"mode": st.sampled_from(get_args(ArbiterMode))}),
        "max_awake_models": st.sampled_from([None, 1, 2]),
        "kv_swap": st.sampled_from(["0", "128KiB", "4MiB"]),
    }
)


@settings(max_examples=40, deadline=None)
@given(
    MODELS,
    UNITS,
    st.lists(
        st.tuples(st.floats(0, 3), st.integers(1, 300), st.integers(1, 200), st.integers(0, 2)), min_size=1, max_size=20
    ),
)
def test_every_request_of_several_models_ends_in_each_mode_with_swap_sleep_and_slos(
    models: list[dict[str, Any]], unit: dict[str, Any], requests: list[tuple[float, int, int, int]]
) -> None:
    named = [sim_model(f"m{index}", **model) for index, model in enumerate(models)]
    bench = Bench(sim_mesh(*named, pool="1MiB", slab="256KiB", **unit), delays=Delays(0.001, 0.001, wake_s=0.01))
    for at_s, num_prompt, num_output, model in requests:
        name = f"m{model % len(models)}"
        bench.request_at(at_s, num_prompt, num_output, name, slo=bench.unit.slo_targets(name, num_prompt))
    bench.run()
    assert all(sum(count for _, count in record.pieces) == record.num_output for record in bench.records)
    granted_s = sum(worker.granted_s for worker in bench.unit.use.workers)
    assert bench.unit.use.busy_s <= granted_s * (1 + 1e-9)
    if unit["arbiter"]["mode"] == "temporal":
        assert bench.unit.use.busy_s == pytest.approx(granted_s)
