"""How the token budget of a step is divided."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from muxmesh.engine.token_budget import divide_token_budget
from muxmesh.scheduling_policy import FCFS, SchedulingPolicy
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
