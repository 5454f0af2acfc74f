from hypothesis import given
from hypothesis import strategies as st

from muxmesh.execution import NO_EXECUTION, Execution, PreemptionReason

executions = st.builds(
    Execution,
    st.dictionaries(st.sampled_from(PreemptionReason), st.integers(1, 9)),
    st.integers(0, 9),
    st.integers(0, 9),
    *[st.integers(0, 99).map(float)] * 4,
    st.booleans(),
)


def test_executions_of_several_attempts_are_added_up() -> None:
    order, priority = PreemptionReason.ORDER, PreemptionReason.PRIORITY
    first = Execution({order: 2}, 1, 1, 10.0, 2.0, 0.0, 0.5)
    second = Execution({order: 1, priority: 4}, 3, 0, 5.0, 1.0, 4.0, is_overdue=True)
    assert first.plus(second) == Execution({order: 3, priority: 4}, 4, 1, 15.0, 3.0, 4.0, 0.5, is_overdue=True)
    assert first.plus(second).num_preemptions == 7


@given(executions, executions)
def test_the_order_of_attempts_does_not_matter_and_nothing_adds_nothing(one: Execution, other: Execution) -> None:
    assert one.plus(other) == other.plus(one)
    assert one.plus(NO_EXECUTION) == one


def test_a_sequence_loses_its_memory_for_the_reasons_that_begin_with_kv() -> None:
    kept = {reason for reason in PreemptionReason if not reason.is_memory}
    assert kept == {"order", "slo", "priority", "fairness", "overdue"}
