"""The rules of the arbiter, one by one. `test_arbiter_scenarios` has whole situations."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.arbiter import Arbiter, Decision, Demand, slots_of
from kvstore.stall_budget import WINDOW_S
from muxmesh.config.arbiter_config import ArbiterConfig
from muxmesh.types import ArbiterMode, Role

GATING_MODES: tuple[ArbiterMode, ...] = ("adbs", "fcfs", "roundrobin", "temporal")


def arbiter(mode: ArbiterMode = "adbs", **options: float) -> Arbiter:
    return Arbiter(ArbiterConfig.model_validate({"mode": mode, **options}))


def prefill(slot: int, model: str = "", share: float = 1.0, **options: float) -> Demand:
    return Demand(slot, Role.PREFILL, model or f"model{slot}", share, **options)  # type: ignore[arg-type]


def decode(slot: int, model: str = "", share: float = 1.0, **options: float) -> Demand:
    return Demand(slot, Role.DECODE, model or f"model{slot}", share, **options)  # type: ignore[arg-type]


def decided(granted: set[int], kept: set[int]) -> Decision:
    return Decision(frozenset(granted), frozenset(kept))


def turns(one: Arbiter, waiting: list[Demand], num_turns: int) -> list[int]:
    """The slots that compute, one after another, if every worker demands again at once."""
    result = []
    for _ in range(num_turns):
        (slot,) = one.decide(waiting, ()).granted
        result.append(slot)
    return result


def test_a_worker_that_computes_alone_keeps_its_grant() -> None:
    assert arbiter().decide([decode(2)], ()) == decided({2}, {2})
    assert arbiter().decide((), [decode(2)]) == decided(set(), {2})


def test_a_grant_is_recalled_from_its_start_if_another_worker_waits_already() -> None:
    assert arbiter().decide([decode(1), decode(2)], ()) == decided({1}, set())


def test_workers_compute_together_as_long_as_their_shares_fit() -> None:
    waiting = [decode(0, share=0.5), decode(1, share=0.3), decode(2, share=0.2)]
    assert arbiter().decide(waiting, ()) == decided({0, 1, 2}, {0, 1, 2})


def test_sums_of_shares_are_compared_without_rounding_errors() -> None:
    waiting = [decode(slot, share=0.1) for slot in range(10)]
    assert sum(one.share for one in waiting) != 1.0
    assert len(arbiter().decide(waiting, ()).granted) == 10


@pytest.mark.parametrize(("percent", "num"), [(0, 1), (19, 1), (20, 2)])
def test_over_subscription_lets_the_sum_of_shares_exceed_the_device(percent: int, num: int) -> None:
    waiting = [decode(0, share=0.6), decode(1, share=0.6)]
    assert len(arbiter(over_subscription=percent).decide(waiting, ()).granted) == num


def test_no_more_is_recalled_than_the_waiting_worker_needs() -> None:
    computing = [decode(0, share=0.1), decode(1, share=0.5), decode(2, share=0.4)]
    one = arbiter()
    one.decide(computing, ())
    assert one.decide([prefill(3, share=0.5)], computing).kept == {0, 2}, "without 0, which was tried first"


def test_a_drain_goes_on_with_the_grants_that_it_recalled_first() -> None:
    one = arbiter()
    computing = [decode(0, share=0.5), decode(1, share=0.25), decode(2, share=0.25)]
    one.decide(computing, ())
    waiting = [prefill(3, share=0.75)]
    assert one.decide(waiting, computing).kept == {2}
    assert one.decide(waiting, computing[:1] + computing[2:]).kept == {2}


def test_prefill_grants_are_recalled_only_when_decodes_do_not_suffice() -> None:
    one = arbiter()
    computing = [prefill(0, share=0.5), decode(1, share=0.5)]
    one.decide(computing, ())
    assert one.decide([decode(2, share=0.5)], computing).kept == {0}
    assert one.decide([decode(2, share=0.6)], computing).kept == set()


def test_replicas_of_a_model_share_its_turn() -> None:
    waiting = [prefill(0, "a"), prefill(1, "a"), prefill(2, "b")]
    assert turns(arbiter(), waiting, 8) == [0, 2, 1, 2, 0, 2, 1, 2]


@pytest.mark.parametrize("mode", ["fcfs", "temporal"])
def test_fcfs_has_prefills_first_and_each_role_by_its_oldest_request(mode: ArbiterMode) -> None:
    waiting = [
        prefill(0, "a", arrived_at_s=30.0),
        prefill(1, "b", arrived_at_s=20.0),
        decode(2, "b", arrived_at_s=10.0),
        decode(3, "a", arrived_at_s=5.0),
    ]
    assert turns(arbiter(mode), waiting, 2) == [1, 1]
    assert turns(arbiter(mode), waiting[:1] + waiting[2:], 1) == [0]
    assert turns(arbiter(mode), waiting[2:], 2) == [3, 3]


def test_while_a_prefill_computes_decodes_fill_the_rest_before_the_next_prefill() -> None:
    waiting = [prefill(0, share=0.8), decode(1, share=0.2), decode(2, share=0.2)]
    computing = [prefill(3, share=0.8)]
    assert arbiter().decide(waiting[:1], computing) == decided(set(), set()), "they take turns, step by step"
    assert arbiter().decide(waiting, computing) == decided({1}, set()), "1 and 2 take turns too"
    assert arbiter().decide(waiting[:2], computing) == decided({1}, {1})


def test_while_a_prefill_waits_for_decodes_no_decode_starts() -> None:
    assert arbiter().decide([prefill(0, share=0.8), decode(1, share=0.2)], [decode(2, share=0.8)]).granted == set()
    assert arbiter().decide([decode(0, share=0.8), decode(1, share=0.2)], [decode(2, share=0.8)]).granted == {1}


def test_temporal_ignores_shares_and_spatial_ignores_their_sum() -> None:
    waiting = [decode(0, share=0.1), decode(1, share=0.1)]
    assert len(arbiter("temporal").decide(waiting, ()).granted) == 1
    everything = [*waiting, decode(2), prefill(3)]
    assert arbiter("spatial").decide(everything, [decode(4)]) == decided({0, 1, 2, 3}, {0, 1, 2, 3, 4})


def test_roundrobin_serves_all_workers_alike() -> None:
    waiting = [prefill(0, "a"), decode(1, "a"), prefill(2, "b"), decode(3, "b")]
    assert turns(arbiter("roundrobin"), waiting, 6) == [0, 1, 2, 3, 0, 1]


def test_auto_and_an_unset_over_subscription_are_adbs_without_any() -> None:
    waiting = [decode(0, share=0.6), prefill(1, share=0.6)]
    assert arbiter("auto").decide(waiting, ()) == arbiter("adbs", over_subscription=0).decide(waiting, ())


def due(demand: Demand, in_s: float, lost_in_s: float | None = None) -> Demand:
    """A worker one of whose sequences is due in some seconds, and lost then or later."""
    return replace(demand, due_at_s=in_s, lost_at_s=in_s if lost_in_s is None else lost_in_s)


def test_a_missed_target_gives_no_precedence() -> None:
    assert turns(arbiter(), [prefill(0), due(decode(1), -0.1)], 1) == [0]
    assert turns(arbiter(), [prefill(0), due(decode(1), 0.01)], 1) == [1]
    assert turns(arbiter(), [prefill(0), due(decode(1), 0.2)], 1) == [0]


def test_a_late_sequence_that_can_still_catch_up_is_due() -> None:
    assert turns(arbiter(), [prefill(0), due(decode(1), -0.1, 0.4)], 1) == [1]
    assert turns(arbiter(), [due(prefill(0), 0.01), due(decode(1), -0.1, 0.4)], 1) == [1]


def test_time_passes_between_decisions() -> None:
    waiting = [prefill(0), due(decode(1), 105.0)]
    granted = [arbiter().decide(waiting, (), now_s).granted for now_s in (100.0, 104.99, 105.01)]
    assert granted == [{0}, {1}, {0}], "due in 5 s, due soon, missed"


def test_of_two_urgent_workers_the_earliest_due_goes_first() -> None:
    assert turns(arbiter(), [due(prefill(0), 0.019), due(decode(1), 0.01)], 1) == [1]
    assert turns(arbiter(), [due(prefill(0), 0.01), due(decode(1), 0.019)], 1) == [0]
    assert turns(arbiter(), [due(decode(1), 0.01), due(prefill(0), 0.01)], 1) == [0]


@pytest.mark.parametrize(
    ("flooded", "other", "is_deferred"),
    [
        (due(prefill(0, "a"), 0.001), due(decode(1, "b"), 0.002), True),
        (due(prefill(0, "a"), -1.0), decode(1, "b"), True),
        (prefill(0, "a"), decode(1, "b"), False),
        (due(decode(0, "a"), 0.001), due(decode(1, "b"), 0.002), False),
    ],
)
def test_urgent_and_late_prefills_of_a_model_above_its_part_give_way(
    flooded: Demand, other: Demand, is_deferred: bool
) -> None:
    """As long as no model has used the device, the flooded one goes first in all of these."""
    one = arbiter()
    assert turns(one, [flooded, other], 1) == [0]
    one = arbiter()
    for model, seconds in (("a", 1.8), ("b", 0.6)):
        one.count_use(model, seconds, 0.0)
    assert turns(one, [flooded, other], 1) == [1 if is_deferred else 0]


def test_late_prompts_of_a_flooded_model_give_way_for_a_while() -> None:
    one = arbiter(max_overtakes=32)
    for model, seconds in (("a", 1.8), ("b", 0.6)):
        one.count_use(model, seconds, 0.0)
    waiting = [due(prefill(0, "a"), -1.0), decode(1, "b")]
    # The first grant to a worker is not an overtake, only further ones are.
    assert turns(one, waiting, 12) == [1] * 9 + [0] + [1] * 2


def test_a_worker_is_overtaken_at_most_as_often_as_the_setting_allows() -> None:
    waiting = [prefill(0, "a"), prefill(1, "b"), decode(2, "c")]
    assert turns(arbiter(max_overtakes=3), waiting, 12) == [0, 1, 0, 1, 0, 2, 1, 0, 1, 0, 1, 2]


DEMANDS = st.builds(
    Demand,
    st.just(0),
    st.sampled_from([Role.PREFILL, Role.DECODE]),
    st.sampled_from("abc"),
    st.integers(1, 10).map(lambda tenths: tenths / 10),
    st.integers(0, 1),
    st.sampled_from([math.inf, 1.0, 0.01, -1.0]),
    st.sampled_from([math.inf, 1.0, -1.0]),
)
WORKERS = st.lists(DEMANDS, min_size=1, max_size=6).map(
    lambda all_of: [replace(one, slot=slot) for slot, one in enumerate(all_of)]
)


class Unit:
    """Workers as in a unit: each returns its grant at the end of a step if it was recalled, and demands again."""

    def __init__(self, workers: list[Demand], mode: ArbiterMode, percent: int, max_overtakes: int) -> None:
        self.arbiter = arbiter(mode, over_subscription=percent, max_overtakes=max_overtakes)
        self.limit = 1 + percent / 100 + 1e-6 if mode != "temporal" else math.inf
        self.most = 1 if mode == "temporal" else 6
        self.workers = {one.slot: one for one in workers}
        self.waiting, self.computing, self.recalled = set(self.workers), set[int](), set[int]()
        self.granted: frozenset[int] = frozenset()

    def end_step(self, slot: int, has_more_work: bool) -> None:
        if slot not in self.computing:
            return
        self.workers[slot] = replace(self.workers[slot], arrived_at_s=self.workers[slot].arrived_at_s + 1)
        if slot in self.recalled or not has_more_work:
            self.computing.remove(slot)
            if has_more_work:
                self.waiting.add(slot)

    def arbitrate(self) -> None:
        waiting = [self.workers[slot] for slot in sorted(self.waiting)]
        decision = self.arbiter.decide(waiting, [self.workers[slot] for slot in sorted(self.computing)])
        assert decision.granted <= self.waiting and decision.kept <= self.computing | decision.granted
        self.granted = decision.granted
        self.waiting -= decision.granted
        self.computing |= decision.granted
        self.recalled = self.computing - decision.kept
        assert self.computing or not self.waiting, "the device is idle while a worker waits"
        assert bool(self.recalled) <= bool(self.waiting), "a grant is recalled that no worker needs"
        used = sum(self.workers[slot].share for slot in self.computing)
        assert used <= self.limit and len(self.computing) <= self.most


@given(WORKERS, st.sampled_from(GATING_MODES), st.sampled_from([0, 20]), st.lists(st.integers(0, 17), max_size=60))
def test_shares_are_never_exceeded_and_no_worker_waits_for_ever(
    workers: list[Demand], mode: ArbiterMode, percent: int, events: list[int]
) -> None:
    """An event below 6 ends a step of a worker, one below 12 its work too, and the others let it demand again."""
    unit = Unit(workers, mode, percent, max_overtakes=2)
    unit.arbitrate()
    for event in events:
        slot = event % 6
        if event >= 12 and slot in unit.workers and slot not in unit.computing:
            unit.waiting.add(slot)
        unit.end_step(slot, has_more_work=event < 6)
        unit.arbitrate()
    unit.waiting |= unit.workers.keys() - unit.computing
    unit.arbitrate()
    last_round = dict.fromkeys(unit.workers, 0)
    for number in range(60):
        for slot in sorted(unit.computing):
            last_round[slot] = number
            unit.end_step(slot, has_more_work=True)
        unit.arbitrate()
        assert min(last_round.values()) >= number - 20, "a worker starves"


@given(WORKERS, st.data())
def test_the_order_of_the_demands_does_not_matter(workers: list[Demand], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(workers))
    for mode in GATING_MODES:
        assert arbiter(mode).decide(shuffled, ()) == arbiter(mode).decide(workers, ())


def test_slots_of_names_the_slots() -> None:
    assert slots_of([decode(3), prefill(1)]) == {1, 3}


# The end of a prefill step


def test_a_prefill_step_ends_before_the_first_token_of_the_waiting_decodes_is_due() -> None:
    waiting = [prefill(0), decode(1, due_at_s=10.2, lost_at_s=12), decode(2, due_at_s=10.1, lost_at_s=12)]
    assert arbiter().decide(waiting, (), 10.0).step_ends_s == {0: 10.1}
    missed = [prefill(0), decode(1, due_at_s=9.0, lost_at_s=9.5), decode(2, due_at_s=10.2, lost_at_s=12)]
    assert arbiter().decide(missed, (), 10.0).step_ends_s == {0: 10.2}, "a missed target is not waited for"


@pytest.mark.parametrize("mode", ["adbs", "roundrobin"])
def test_without_targets_prefills_hold_up_a_decode_worker_for_a_limited_time(mode: ArbiterMode) -> None:
    one = arbiter(mode, max_stall_s=0.25)
    assert one.longest_step_s == 0.25
    assert one.decide([prefill(0), decode(1)], (), 10.0).step_ends_s == {0: 10.25}
    assert one.decide([decode(1)], [prefill(0)], 10.2).step_ends_s == {0: 10.25}, "from the first prefill step on"


def test_a_decode_worker_that_prefills_have_held_up_for_so_long_goes_next() -> None:
    one = arbiter(max_stall_s=0.25)
    assert one.decide([prefill(0), decode(1)], (), 10.0).granted == {0}
    assert one.decide([prefill(0), decode(1)], (), 10.2).granted == {0}
    assert one.decide([prefill(0), decode(1)], (), 10.24).granted == {1}, "within the slack that counts as urgent"
    assert one.decide([prefill(0), decode(1)], (), 10.3).granted == {0}, "its wait begins again"


def test_a_decode_worker_that_waits_for_other_decodes_is_not_held_up_by_prefills() -> None:
    one = arbiter(max_stall_s=0.25)
    assert one.decide([decode(1), decode(2)], (), 10.0).granted == {1}
    assert one.decide([prefill(0), decode(2)], (), 11.0).granted == {0}


def test_no_step_is_cut_for_a_worker_that_would_not_go_next() -> None:
    due: dict[str, Any] = {"due_at_s": 10.2, "lost_at_s": 12}
    better = arbiter().decide([prefill(0, priority=-1), decode(1, **due)], (), 10.0)
    sooner = arbiter().decide([prefill(0, due_at_s=10.01, lost_at_s=10.01), decode(1, **due)], (), 10.0)
    beside = arbiter().decide([prefill(0, share=0.5), decode(1, share=0.6, **due)], (), 10.0)
    assert (better.step_ends_s, sooner.step_ends_s) == ({}, {})
    assert beside.granted == {0} and beside.step_ends_s == {0: 10.2}
    fits = arbiter().decide([decode(1, share=0.6, **due), decode(2, share=0.6)], [prefill(0, share=0.3)], 10.0)
    assert fits.step_ends_s == {}, "they wait for each other"


def test_the_step_of_a_prefill_that_was_overtaken_too_often_is_not_cut() -> None:
    one = arbiter(max_overtakes=1)
    late: dict[str, Any] = {"due_at_s": 9.9, "lost_at_s": 12.0}
    turns_ = [one.decide([prefill(0), decode(1, **late)], (), 10.0) for _ in range(4)]
    assert [sorted(turn.granted) for turn in turns_] == [[1], [1], [0], [1]]
    assert turns_[2].step_ends_s == {}


@pytest.mark.parametrize("mode", ["fcfs", "temporal", "spatial"])
def test_other_modes_bound_no_step(mode: ArbiterMode) -> None:
    one = arbiter(mode)
    assert one.longest_step_s == math.inf
    assert one.decide([prefill(0), decode(1)], (), 10.0).step_ends_s == {}


def test_steps_that_go_early_have_a_budget_and_without_it_prefills_go_first_again() -> None:
    """Of 2 % of the device, 0.1 s are saved up: a decode step of 60 ms may begin twice."""
    one, now_s, granted = arbiter(max_stall_s=0.25, max_overtakes=1000, stall_budget=0.02), 0.0, list[int]()
    for _ in range(40):
        (slot,) = one.decide([prefill(0), decode(1)], (), now_s).granted
        granted.append(slot)
        now_s += 0.06 if slot else 0.25
    assert [at for at, slot in enumerate(granted) if slot][:2] == [1, 3]
    assert sum(granted) == 5, "the others as the budget is filled again"
    assert one.num_held_up == {}
    late = [decode(1, due_at_s=now_s + 0.001, lost_at_s=now_s + 9)]
    assert one.decide([prefill(0), *late], (), now_s).granted == {1}, "due by its SLO"
    assert one.num_held_up == {"model1": 1}


def test_a_decode_worker_that_goes_on_alone_uses_up_no_budget() -> None:
    one = arbiter(max_stall_s=0.25, stall_budget=0.01)
    assert one.decide([prefill(0), decode(1)], (), 0.0).granted == {0}
    assert one.decide([decode(1)], (), 0.3).granted == {1}
    for at_s in (9.0, 9.3):
        assert one.decide([prefill(0), decode(1)], (), at_s).granted == {0 if at_s == 9.0 else 1}


@pytest.mark.parametrize("stall_budget", [1.0, 0.1])
@given(st.lists(st.floats(0.001, 0.6), min_size=60, max_size=60), st.integers(1, 3), st.integers(1, 3))
def test_prefills_never_hold_up_a_decode_for_longer_than_the_bound_and_one_step(
    stall_budget: float, steps_s: list[float], num_prefills: int, num_decodes: int
) -> None:
    """Every worker always has work. A prefill step takes what it would, or as long as it may, at least 50 ms."""
    one, now_s, least_s, step_s = (
        arbiter(max_stall_s=0.25, max_overtakes=1000, stall_budget=stall_budget),
        0.0,
        0.05,
        0.01,
    )
    workers = [prefill(slot) for slot in range(num_prefills)] + [decode(10 + slot) for slot in range(num_decodes)]
    held_up_s = dict.fromkeys((worker.slot for worker in workers if worker.role is Role.DECODE), 0.0)
    early_s = 0.0
    for whole_s in steps_s:
        decision = one.decide(workers, (), now_s)
        (slot,) = decision.granted
        if slot >= 10:
            held_up_s[slot] = 0.0
            now_s += step_s
            early_s += step_s
        else:
            taken_s = min(
                whole_s, max(least_s, min(decision.step_ends_s.get(slot, math.inf) - now_s, one.longest_step_s))
            )
            now_s += taken_s
            for waiting in held_up_s:
                held_up_s[waiting] += taken_s
        assert early_s <= stall_budget * (now_s + WINDOW_S) + step_s
        assert stall_budget < 1 or max(held_up_s.values()) <= 0.25 + least_s + 1e-9
