"""One unit on the simulator."""

from dataclasses import replace

import pytest

from benchmarks.muxserve.cases import UnitCase
from benchmarks.muxserve.replay import kv_pool_bytes, unit_config
from muxmesh.errors import ConfigError
from tests.benchmarks.muxserve.miniature import model, replayer


def test_a_request_alone_takes_the_unloaded_latency_and_the_overhead() -> None:
    (plain,) = replayer().replay(UnitCase("u", 1, (model(),)))
    (slower,) = replayer(overhead=0.5).replay(UnitCase("u", 1, (model(),)))
    assert plain.ttft_s == pytest.approx(0.1)
    assert plain.latency_s == pytest.approx(0.1 + 50 * (0.01 + 1e-5 * 125), rel=0.01)
    assert slower.latency_s == pytest.approx(1.5 * plain.latency_s)
    assert (plain.attainment(2), slower.attainment(1)) == (1.0, 0.0)


def test_neighbours_cost_what_contention_says() -> None:
    models = (model("a", 3), model("b", 3))
    alone = replayer().replay(UnitCase("u", 1, models))
    beside = replayer(contention=1.0).replay(UnitCase("u", 1, models))
    assert beside[0].latency_s > 1.2 * alone[0].latency_s


def test_in_strict_order_a_model_waits_for_the_slots_of_another() -> None:
    models = (model("full", 20, max_num_seqs=1), model("free", 20))
    case = UnitCase("u", 1, models, mode="temporal", over_subscription=0)
    _, free = replayer().replay(case)
    _, blocked = replayer().replay(replace(case, strict_order=True))
    assert free.ttft_s < 2
    assert blocked.ttft_s > 5


def test_with_an_slo_tokens_that_are_due_go_before_prompts() -> None:
    models = (model("streams", 4, duration_s=10.0), model("prompts", 80, duration_s=10.0, mean_output=2.0))
    case = UnitCase("u", 1, models, over_subscription=0)
    _, plain = replayer().replay(case)
    _, with_slo = replayer().replay(replace(case, slo_scale=4))
    assert with_slo.latency_s < 0.5 * plain.latency_s


def test_a_bounded_stall_costs_streams_little_and_outputs_of_few_tokens_gain() -> None:
    models = (model("streams", 4, duration_s=10.0), model("prompts", 80, duration_s=10.0, mean_output=2.0))
    case = UnitCase("u", 1, models, over_subscription=0)
    without, bounded = (replayer().replay(replace(case, stall_budget=part)) for part in (0.0, 0.1))
    assert bounded[0].latency_s < 1.03 * without[0].latency_s
    assert bounded[1].latency_s < 0.5 * without[1].latency_s


def test_a_unit_without_memory_for_kv_is_refused_by_name() -> None:
    case = UnitCase("u", 1, tuple(model(name) for name in "abcd"))
    assert kv_pool_bytes(case, replayer().constants) < 0
    with pytest.raises(ConfigError, match="u: a, b, c, d leave"):
        unit_config(case, replayer().constants)
