from hypothesis import given
from hypothesis import strategies as st

from kvstore.stall_budget import WINDOW_S, StallBudget


def test_a_step_may_begin_while_something_is_left_and_the_debt_is_paid_by_time() -> None:
    budget = StallBudget(0.1)
    budget.begin(3, 1.0, 0.0)
    budget.end([3], 0.4)
    assert not budget.is_used_up(0.4), "it still computes"
    budget.end([], 0.75)
    assert budget.is_used_up(0.75), "0.5 s were left"
    assert budget.is_used_up(3.2)
    assert not budget.is_used_up(3.3)


def test_a_step_on_a_part_of_the_device_counts_as_that_part() -> None:
    budget = StallBudget(0.1)
    budget.begin(3, 0.25, 0.0)
    budget.begin(4, 0.2, 0.0)
    budget.end([4], 1.0)
    budget.end([], 1.0)
    assert not budget.is_used_up(1.0)


def test_without_a_part_nothing_is_left_and_with_all_of_it_there_is_always_something() -> None:
    assert StallBudget(0.0).is_used_up(1e6)
    whole = StallBudget(1.0)
    for second in range(100):
        whole.begin(0, 1.0, float(second))
        whole.end([], second + 1.0)
        assert not whole.is_used_up(second + 1.0)


@given(st.floats(0, 1), st.lists(st.tuples(st.floats(0, 3), st.floats(0.001, 1)), max_size=50))
def test_steps_take_no_more_than_the_part_of_the_time_and_one_step(
    part: float, steps: list[tuple[float, float]]
) -> None:
    budget, now_s, used_s = StallBudget(part), 0.0, 0.0
    for gap_s, step_s in steps:
        now_s += gap_s
        if budget.is_used_up(now_s):
            continue
        budget.begin(0, 1.0, now_s)
        now_s += step_s
        used_s += step_s
        budget.end([], now_s)
        assert used_s <= part * (now_s + WINDOW_S) + step_s + 1e-9
