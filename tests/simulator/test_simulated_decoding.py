import pytest

from muxmesh.device.kv_codec import encoded_bytes
from muxmesh.models.model_spec import SIM_SPEC
from muxmesh.types import KvFormat
from simulator.timeline import Delays
from tests.support.simulations import STEP_S, sim_mesh, sim_model
from tests.support.unit_bench import TOKEN_BLOCK_BYTES, TOKENS_PER_MIB, Bench


def test_a_full_pool_preempts_sequences_and_loses_no_token() -> None:
    bench = Bench(sim_mesh(sim_model(slots=64, kv_answer_tokens=1), pool="1MiB", slab="1MiB"))
    num_output = TOKENS_PER_MIB // 8  # eight of them fill the pool
    for _ in range(24):
        bench.request_at(0.0, 16, num_output)
    bench.run()
    assert bench.unit.use.num_requeued > 0
    for record in bench.records:
        assert record.is_ok and sum(count for _, count in record.pieces) == record.num_output == num_output
    assert len(bench.decisions) == 24 + bench.unit.use.num_requeued


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
    assert bench.unit.use.num_requeued == 1 and 500 < num_sent[0] < 1000
    assert [first.ttft_s, second.ttft_s] == pytest.approx([STEP_S, 3 * STEP_S])  # decode has every other step
    assert (second.num_cached, second.pieces[0][1]) == (0, 1)
    num_prefill_steps = -(-(100 + num_sent[0] - num_cached) // 128)
    num_steps = num_prefill_steps + num_output - num_sent[0] - 1
    assert second.e2el_s == pytest.approx(first.e2el_s + num_steps * STEP_S)


@pytest.mark.parametrize("kv_format", ["raw", "int8"])
def test_a_preempted_sequence_is_swapped_out_and_in_and_nothing_is_computed_again(kv_format: KvFormat) -> None:
    model, speed = sim_model(slots=2, kv_answer_tokens=1, kv_swap_format=kv_format), 2.0**28
    bench = Bench(sim_mesh(model, pool="1MiB", slab="1MiB", kv_swap="2MiB"), delays=Delays(swap_bytes_per_s=speed))
    num_output = TOKENS_PER_MIB - 248  # one fits the pool, two do not
    for index in range(2):
        hashes = tuple(bytes([index, block]) for block in range(6))
        bench.request_at(0.0, 100, num_output, hashes=hashes)
    num_sent = list[int]()
    bench.timeline.at(15.0, lambda: num_sent.append(bench.requests[1].num_sent))
    bench.run()
    first, second = bench.records
    assert (bench.unit.use.num_swapped, bench.unit.use.num_requeued, len(bench.decisions)) == (1, 0, 2)
    assert 500 < num_sent[0] < 1000
    num_bytes = encoded_bytes(SIM_SPEC.kv_shape(16, "float32"), 99 + num_sent[0], kv_format)
    copied_s = num_bytes / speed if kv_format == "int8" else (num_bytes - 6 * TOKEN_BLOCK_BYTES) / speed
    assert second.e2el_s - first.e2el_s == pytest.approx((num_output - num_sent[0]) * STEP_S + copied_s, abs=1e-4)
    assert bench.unit.unit.swap.num_free_pages == bench.unit.unit.swap.num_pages


def test_a_full_pool_swaps_sequences_and_loses_no_token() -> None:
    bench = Bench(sim_mesh(sim_model(slots=64, kv_answer_tokens=1), pool="1MiB", slab="1MiB", kv_swap="16MiB"))
    num_output = TOKENS_PER_MIB // 8  # eight of them fill the pool
    for _ in range(24):
        bench.request_at(0.0, 16, num_output)
    bench.run()
    assert bench.unit.use.num_swapped > 0 and bench.unit.use.num_requeued == 0 and len(bench.decisions) == 24
    assert all(sum(count for _, count in one.pieces) == one.num_output == num_output for one in bench.records)


def test_a_sequence_is_computed_again_if_the_swap_region_is_full() -> None:
    bench = Bench(sim_mesh(sim_model(slots=64, kv_answer_tokens=1), pool="1MiB", slab="1MiB", kv_swap="128KiB"))
    for _ in range(24):
        bench.request_at(0.0, 16, TOKENS_PER_MIB // 8)
    bench.run()
    assert bench.unit.use.num_requeued > 0 and all(record.is_ok for record in bench.records)


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
    assert 1.0 < owner.record.ttft_s < 3.0 and bench.unit.use.num_requeued > 0
