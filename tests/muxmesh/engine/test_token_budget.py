"""How the token budget of a step is divided."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from muxmesh.engine.step_limit import StepLimit
from muxmesh.engine.token_budget import divide_token_budget
from muxmesh.scheduling_policy import FCFS, SchedulingPolicy
from muxmesh.step_cost import StepCost
from muxmesh.types import SchedulingState


@dataclass(frozen=True)
class Item:
    """What the budget is divided by."""

    scheduling: SchedulingState
    num_computed_tokens: int
    num_uncomputed_tokens: int


items = st.lists(
    st.builds(
        lambda priority, arrived, computed, uncomputed: Item(SchedulingState(priority, arrived), computed, uncomputed),
        st.integers(-1, 1),
        st.integers(0, 5).map(float),
        st.integers(0, 5000),
        st.integers(1, 40),
    ),
    max_size=12,
)


@given(items, st.integers(1, 8), st.integers(1, 64))
def test_a_divided_budget_is_kept_and_in_order(of: list[Item], max_num_seqs: int, token_budget: int) -> None:
    shares = divide_token_budget(of, FCFS, 0.0, max_num_seqs, token_budget)
    assert bool(shares) is bool(of)
    assert len(shares) <= min(max_num_seqs, len(of))
    assert all(1 <= count <= item.num_uncomputed_tokens for item, count in shares)
    assert len(shares) == 1 or sum(count for _, count in shares) <= token_budget
    keys = [
        (item.num_uncomputed_tokens > 1, item.scheduling.priority, item.scheduling.arrived_at_s) for item, _ in shares
    ]
    assert keys == sorted(keys)


@given(items, st.integers(1, 8))
def test_no_sequence_that_decodes_waits_while_a_prompt_is_computed(of: list[Item], max_num_seqs: int) -> None:
    shares = divide_token_budget(of, FCFS, 0.0, max_num_seqs, token_budget=max_num_seqs)
    decoding = sum(item.num_uncomputed_tokens == 1 for item in of)
    assert sum(item.num_uncomputed_tokens == 1 for item, _ in shares) == min(decoding, max_num_seqs)


def test_the_order_is_that_of_the_policy_at_the_time_of_the_step() -> None:
    policy = SchedulingPolicy("hrrn", longest_lead=0.0, longest_lead_s=0.0, quantum_s=1.0)
    old = Item(SchedulingState(0, arrived_at_s=0.0, decode_s=100.0), 9, 1)
    short = Item(SchedulingState(0, arrived_at_s=9.0, decode_s=1.0), 9, 1)
    assert divide_token_budget([old, short], policy, 9.05, 1, 8) == [(old, 1)]
    assert divide_token_budget([old, short], policy, 10.0, 1, 8) == [(short, 1)]


@given(items, st.integers(1, 8), st.integers(8, 64), st.floats(-0.1, 0.2))
def test_a_step_ends_in_time_and_prompts_progress(
    of: list[Item], max_num_seqs: int, token_budget: int, longest_s: float
) -> None:
    limit = StepLimit(StepCost(0.01, 0.001, 1e-7), longest_s)
    whole = divide_token_budget(of, FCFS, 0.0, max_num_seqs, token_budget)
    cut = divide_token_budget(of, FCFS, 0.0, max_num_seqs, token_budget, limit)
    assert len(cut) >= bool(of)
    decoding = [one for one in whole if one[0].num_uncomputed_tokens == 1]
    assert [one for one in cut if one[0].num_uncomputed_tokens == 1] == decoding, "only prompts are cut"
    prompts = [one for one in cut if one[0].num_uncomputed_tokens > 1]
    assert bool(prompts) is (len(whole) > len(decoding))
    if prompts:
        first, count = prompts[0]
        least = limit.min_tokens(token_budget)
        assert count >= min(least, {id(item): count for item, count in whole}[id(first)])
        seconds = sum(limit.chunk_s(item.num_computed_tokens, count) for item, count in cut)
        assert 0.01 + seconds <= longest_s + 1e-9 or (len(prompts) == 1 and count < 2 * least)


def test_a_prompt_is_cut_to_what_ends_in_time() -> None:
    prompt, limit = Item(SchedulingState(0, 0.0), 0, 100), StepLimit(StepCost(0.01, 0.001, 0.0), 0.0505)
    assert divide_token_budget([prompt], FCFS, 0.0, 8, 64, limit) == [(prompt, 40)]
    assert divide_token_budget([prompt], FCFS, 0.0, 8, 64) == [(prompt, 64)]
