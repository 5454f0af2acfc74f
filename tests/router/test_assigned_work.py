from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.assigned_work import AssignedSequence, AssignedWork


def test_prefill_is_over_all_models_and_decode_of_one() -> None:
    work = AssignedWork()
    first, second = work.add("m", 1.0, 10.0), work.add("n", 2.0, 30.0)
    work.add("m", 4.0, 20.0)
    assert (work.prefill_s, work.num("m"), work.mean_decode_s("m"), work.mean_decode_s("n")) == (7.0, 2, 15.0, 30.0)
    work.prefilled(second)
    assert (work.prefill_s, work.num("n")) == (5.0, 1), "it still decodes"
    work.remove(first)
    work.remove(second)
    assert (work.prefill_s, work.num("m"), work.mean_decode_s("n")) == (4.0, 1, None)


def test_credits_are_counted_by_model() -> None:
    work = AssignedWork()
    first, second = work.add("m", 1.0, 1.0), work.add("n", 1.0, 1.0)
    work.credited(first)
    assert (work.num_credited("m"), work.num_credited("n")) == (1, 0)
    work.remove(second)
    work.remove(first)
    assert (work.num_credited("m"), work.num_credited("n")) == (0, 0)


def test_the_prefill_of_those_that_wait_for_a_credit_is_known_by_model() -> None:
    work = AssignedWork()
    first, second, third = work.add("m", 1.0, 1.0), work.add("m", 2.0, 1.0), work.add("m", 4.0, 1.0)
    work.add("n", 8.0, 1.0)
    work.credited(first)
    assert (work.queued_prefill_s("m"), work.queued_prefill_s("n"), work.prefill_s) == (6.0, 8.0, 15.0)
    work.remove(second)
    assert work.queued_prefill_s("m") == 4.0
    work.credited(third)
    work.prefilled(third)
    assert (work.queued_prefill_s("m"), work.prefill_s) == (0.0, 9.0)
    assert work.queued_prefill_s("x") == 0.0


def test_a_prompt_is_computed_once() -> None:
    work = AssignedWork()
    first, _ = work.add("m", 1.0, 1.0), work.add("m", 5.0, 1.0)
    for _ in range(2):
        work.prefilled(first)
    assert work.prefill_s == 5.0


class Histories(RuleBasedStateMachine):
    """The sums against those of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.work = AssignedWork()
        self.sequences: list[tuple[AssignedSequence, float, float]] = []

    @rule(model=st.sampled_from("mn"), prefill_s=st.floats(0, 1e6), decode_s=st.floats(0, 1e6))
    def add(self, model: str, prefill_s: float, decode_s: float) -> None:
        self.sequences.append((self.work.add(model, prefill_s, decode_s), prefill_s, decode_s))

    @rule(data=st.data())
    def prefilled(self, data: st.DataObject) -> None:
        if self.sequences:
            index = data.draw(st.integers(0, len(self.sequences) - 1))
            sequence, _, decode_s = self.sequences[index]
            self.work.prefilled(sequence)
            self.sequences[index] = (sequence, 0.0, decode_s)

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self.sequences:
            self.work.remove(self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))[0])

    @invariant()
    def sums_are_those_of_the_sequences(self) -> None:
        prefills_s = [prefill_s for _, prefill_s, _ in self.sequences]
        assert abs(self.work.prefill_s - sum(prefills_s)) < 1e-3
        if not any(prefills_s):
            assert self.work.prefill_s == 0.0
        for model in "mn":
            decodes_s = [decode_s for sequence, _, decode_s in self.sequences if sequence.model == model]
            mean_s = self.work.mean_decode_s(model)
            assert self.work.num(model) == len(decodes_s) and (mean_s is None) is (not decodes_s)
            if mean_s is not None:
                assert abs(mean_s - sum(decodes_s) / len(decodes_s)) < 1e-3


TestHistories = Histories.TestCase
