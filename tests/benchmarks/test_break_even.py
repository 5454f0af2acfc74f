import math
from pathlib import Path

import pytest

from benchmarks.break_even import FIXED_SWAP_S, H100_FLOPS, LINKS, MODELS, UTILIZATION, KnownModel, curves, table
from muxmesh.kv_cost import CopyRates, recompute_s, swap_s

BY_NAME = {model.name: model for model in MODELS}
PAGE = Path(__file__).parents[2] / "docs" / "swap.md"


def test_sizes_are_those_of_the_known_models() -> None:
    """By hand: 2 x layers x KV heads x head size x 2 bytes."""
    assert BY_NAME["Llama 3.1 8B"].kv_bytes_per_token == 131_072
    assert BY_NAME["Llama 2 7B"].kv_bytes_per_token == 524_288
    assert BY_NAME["SmolLM2 135M"].kv_bytes_per_token == 23_040


def test_prefill_takes_two_flops_for_each_parameter_and_those_of_attention() -> None:
    model = BY_NAME["Llama 3.1 8B"]
    num_tokens = 1000
    products = 2 * 8.03e9 * num_tokens
    attention = sum(4 * 32 * 32 * 128 * earlier for earlier in range(num_tokens))
    expected_s = (products + attention) / (H100_FLOPS * UTILIZATION)
    assert recompute_s(num_tokens, model.prefill_cost()) == pytest.approx(expected_s)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_at_the_crossover_a_swap_begins_to_win(model: KnownModel) -> None:
    for rate in LINKS.values():
        first = model.crossover(rate)
        if first is None:
            assert model.break_even(model.context_len) > rate
            continue
        for tokens, wins in ((first, True), (first - 1, False)):
            swapped_s = swap_s(tokens * model.kv_bytes_per_token, CopyRates(rate, rate, FIXED_SWAP_S))
            assert (swapped_s <= recompute_s(tokens, model.prefill_cost())) is wins


def test_faster_links_cross_over_sooner() -> None:
    for model in MODELS:
        found = [model.crossover(rate) or math.inf for rate in sorted(LINKS.values())]
        assert found == sorted(found, reverse=True)


def test_no_curve_goes_beyond_its_models_context() -> None:
    found = curves((64, 4096, 8192, 131_072))
    assert [curve.xs[-1] for curve in found] == [model.context_len for model in MODELS]


def test_the_page_has_the_table_of_the_cost_model() -> None:
    text = PAGE.read_text()
    assert "\n".join(table()) in text
