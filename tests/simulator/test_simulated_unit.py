import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.record import Record
from muxmesh.config.schema import MeshConfig
from muxmesh.models.model_spec import SIM_SPEC
from muxmesh.scheduling_policy import FCFS, SchedulingPolicy
from muxmesh.types import LengthPrediction, SchedulingState
from simulator.simulated_unit import Decision, SimulatedRequest, SimulatedUnit
from simulator.timeline import NO_DELAYS, Delays, Timeline
from tests.support.simulations import STEP_S, sim_mesh, sim_model

SRTF = SchedulingPolicy("srtf", 0.0, 0.0, 1.0)
TOKENS_PER_MIB = 2**20 // SIM_SPEC.kv_shape(16, "float32").token_block_bytes * 16


class Bench:
    """One unit on a timeline, with its decisions and the requests that have ended."""

    def __init__(
        self, config: MeshConfig | None = None, policy: SchedulingPolicy = FCFS, delays: Delays = NO_DELAYS
    ) -> None:
        config = config or sim_mesh()
        self.timeline = Timeline()
        self.decisions: list[Decision] = []
        specs = dict.fromkeys(config.models(), SIM_SPEC)
        self.unit = SimulatedUnit(self.timeline, config.units[0], specs, policy, self.decisions.append, delays)
        self.ended: list[int] = []
        self.requests: list[SimulatedRequest] = []

    def request_at(
        self, at_s: float, num_prompt: int = 10, num_output: int = 10, model: str = "m", **fields: Any
    ) -> SimulatedRequest:
        index = len(self.requests)
        arrived = SchedulingState(fields.pop("priority", 0), at_s, decode_s=fields.pop("work_s", 0.0))
        request = SimulatedRequest(
            index, model, num_prompt, num_output, fields.pop("max_new_tokens", num_output), arrived,
            LengthPrediction(num_output, num_output), Record(index, at_s), lambda one: self.ended.append(one.index),
            **fields,
        )  # fmt: skip
        self.requests.append(request)
        self.timeline.at(at_s, lambda: self.unit.enqueue(request))
        return request

    def run(self) -> None:
        """Runs to the end, and checks that nothing is left over."""
        self.timeline.run()
        assert sorted(self.ended) == list(range(len(self.requests)))
        assert self.unit.num_waiting == 0 and self.unit.unit.leased_bytes() == 0
        self.unit.unit.check_integrity()

    @property
    def records(self) -> list[Record]:
        return [request.record for request in self.requests]


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
    bench = Bench(sim_mesh(sim_model(slots=1)))
    for priority in (0, 0, -1):
        bench.request_at(0.01 * len(bench.requests), priority=priority)
    bench.run()
    assert bench.ended == [0, 2, 1]


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


def test_a_full_pool_preempts_sequences_and_loses_no_token() -> None:
    bench = Bench(sim_mesh(sim_model(slots=64, kv_answer_tokens=1), pool="1MiB", slab="1MiB"))
    num_output = TOKENS_PER_MIB // 8  # eight of them fill the pool
    for _ in range(24):
        bench.request_at(0.0, 16, num_output)
    bench.run()
    assert bench.unit.num_requeued > 0
    for record in bench.records:
        assert record.is_ok and sum(count for _, count in record.pieces) == record.num_output == num_output
    assert len(bench.decisions) == 24 + bench.unit.num_requeued


@pytest.mark.parametrize("num_cached", [0, 96])
def test_a_preempted_request_keeps_its_tokens_and_computes_their_kv_again(num_cached: int) -> None:
    bench, num_sent = Bench(sim_mesh(sim_model(slots=2, kv_answer_tokens=1), pool="1MiB", slab="1MiB")), list[int]()
    num_output = TOKENS_PER_MIB - 248  # one fits the pool, two do not
    for _ in range(2):
        hashes = tuple(bytes([len(bench.requests), index]) for index in range(num_cached // 16))
        bench.request_at(0.0, 100, num_output, hashes=hashes)
    first, second = bench.records
    bench.timeline.at(15.0, lambda: num_sent.append(bench.requests[1].num_sent))
    bench.run()
    assert bench.unit.num_requeued == 1 and 500 < num_sent[0] < 1000
    assert [first.ttft_s, second.ttft_s] == pytest.approx([STEP_S, 3 * STEP_S])
    assert (second.num_cached, second.pieces[0][1]) == (0, 1)
    num_prefill_steps = -(-(100 + num_sent[0] - num_cached) // 128)
    num_steps = num_prefill_steps + num_output - num_sent[0] - 1
    assert second.e2el_s == pytest.approx(first.e2el_s + num_steps * STEP_S)


def test_a_loan_returns_to_the_model_that_it_was_guaranteed_to() -> None:
    """One model fills the pool. When the other's request waits for a second, sequences of the first are pre-empted."""
    models = [
        sim_model(name, slots=64, kv_answer_tokens=3000, **fields)
        for name, fields in (("lent", {}), ("owner", {"kv_guaranteed": "1MiB"}))
    ]
    bench = Bench(sim_mesh(*models, pool="2MiB", slab="1MiB"))
    for _ in range(64):
        bench.request_at(0.0, 16, 3000, "lent")
    owner = bench.request_at(5.0, 16, 200, "owner")
    bench.run()
    assert all(record.is_ok for record in bench.records)
    assert 1.0 < owner.record.ttft_s < 3.0 and bench.unit.num_requeued > 0


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
    assert bench.unit.busy_s == pytest.approx(100 * STEP_S)
    assert [record.e2el_s for record in bench.records] == pytest.approx([99 * STEP_S, 100 * STEP_S], abs=2 * STEP_S)


def test_a_queued_request_that_was_preempted_has_its_prefill_to_do_again() -> None:
    arrived = SchedulingState(0, 0.0, prefill_s=2.0, decode_s=10.0)
    request = SimulatedRequest(
        0, "m", 10, 100, 100, arrived, LengthPrediction(100, 100), Record(0, 0.0), lambda one: None
    )
    assert request.scheduling == arrived and request.max_tokens == 110
    request.num_sent = 40
    assert request.scheduling.prefill_s == 2.0
    assert request.scheduling.decode_s == pytest.approx(6.0) and request.scheduling.served_s == pytest.approx(6.0)


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
    config = sim_mesh(sim_model(slots=3, kv_answer_tokens=16), pool="1MiB", slab="1MiB")
    bench = Bench(config, delays=Delays(admit_s=0.003, hand_off_s=0.002, end_s=0.001))
    for at_s, num_prompt, num_output, priority in requests:
        bench.request_at(at_s, num_prompt, num_output, priority=priority)
    bench.run()
    assert all(sum(count for _, count in record.pieces) == record.num_output for record in bench.records)
    changes = [(one.at_s, 1, 1) for one in bench.decisions]
    changes += [(record.ended_s or 0.0, 0, -1) for record in bench.records]
    if bench.unit.num_requeued == 0:
        assert max(itertools.accumulate(change for *_, change in sorted(changes))) <= 3
