"""Quotas: the guaranteed slabs and the sum stay, and slabs move to the models that use theirs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.quotas import ADAPT_EVERY_S, Quotas, Use, adapted, initial_quotas

IDLE = Use(0.0, 0)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 40))
def test_slabs_that_are_not_guaranteed_are_divided_equally(guaranteed: list[int], more: int) -> None:
    least = {f"m{index}": slabs for index, slabs in enumerate(guaranteed)}
    quotas = initial_quotas(sum(guaranteed) + more, least)
    assert sum(quotas.values()) == sum(guaranteed) + more
    extra = [quotas[model] - least[model] for model in least]
    assert max(extra) - min(extra) <= 1


def test_the_slabs_that_a_model_does_not_use_move_to_one_that_waits() -> None:
    use = {"busy": Use(50.0, 3), "idle": Use(5.0, 0)}
    assert adapted({"busy": 50, "idle": 50}, {"busy": 0, "idle": 0}, use) == {"busy": 92, "idle": 8}


def test_a_model_keeps_its_guaranteed_slabs() -> None:
    use = {"busy": Use(50.0, 3), "idle": Use(5.0, 0)}
    assert adapted({"busy": 50, "idle": 50}, {"busy": 0, "idle": 48}, use) == {"busy": 52, "idle": 48}


@pytest.mark.parametrize(
    "use",
    [
        {"a": Use(10.0, 9), "b": IDLE},
        {"a": Use(44.9, 9), "b": IDLE},
        {"a": Use(50.0, 0), "b": IDLE},
        {"a": Use(50.0, 5), "b": Use(49.0, 5)},
    ],
    ids=["waits for slots only", "uses less than 90 %", "nothing waits", "both are full"],
)
def test_no_slab_moves_without_a_model_that_is_full_and_waits_and_one_that_is_not_full(use: dict[str, Use]) -> None:
    quotas = {"a": 50, "b": 50}
    assert adapted(quotas, {"a": 0, "b": 0}, use) == quotas


@pytest.mark.parametrize(("mean_slabs", "num_lost"), [(40.0, 7), (44.0, 3), (44.9, 2)])
def test_a_model_that_loses_slabs_keeps_headroom_over_its_use(mean_slabs: float, num_lost: int) -> None:
    use = {"busy": Use(50.0, 3), "other": Use(mean_slabs, 0)}
    changed = adapted({"busy": 50, "other": 50}, {"busy": 0, "other": 0}, use)
    assert changed == {"busy": 50 + num_lost, "other": 50 - num_lost}


def test_each_model_loses_what_it_does_not_use_but_headroom() -> None:
    use = {"busy": Use(100.0, 3), "idle": IDLE, "half": Use(25.0, 0)}
    changed = adapted({"busy": 100, "idle": 50, "half": 50}, dict.fromkeys(use, 0), use)
    assert changed == {"busy": 169, "idle": 3, "half": 28}


def test_models_that_wait_gain_a_tenth_in_proportion_and_the_longest_queue_the_rest() -> None:
    use = {"large": Use(60.0, 1), "small": Use(20.0, 9), "idle": IDLE}
    changed = adapted({"large": 60, "small": 20, "idle": 20}, dict.fromkeys(use, 0), use)
    assert changed == {"large": 66, "small": 22 + 11, "idle": 1}
    use = {"large": Use(60.0, 1), "small": Use(20.0, 9), "used": Use(17.0, 0)}
    changed = adapted({"large": 60, "small": 20, "used": 20}, dict.fromkeys(use, 0), use)
    assert changed == {"large": 61, "small": 20, "used": 19}


def test_a_model_that_waits_has_at_once_what_it_had_at_first() -> None:
    use = {"flooded": Use(95.0, 900), "back": Use(5.0, 2)}
    initial = {"flooded": 40, "back": 60}
    assert adapted({"flooded": 95, "back": 5}, {"flooded": 0, "back": 0}, use, initial) == initial


def test_popularity_that_shifts_is_followed_within_two_adaptations() -> None:
    quotas, used, waiting = quotas_of(100, a=0, b=0), {"a": 50, "b": 0}, {"a": 9, "b": 0}
    found = []
    for number in range(10):
        now_s = number * ADAPT_EVERY_S
        if number == 4:
            used, waiting = {"a": 90, "b": 4}, {"a": 1, "b": 9}
        if number == 5:
            used, waiting = {"a": 10, "b": 50}, {"a": 0, "b": 9}
        quotas.count_use(now_s, used.__getitem__)
        quotas.adapt(now_s, waiting.__getitem__)
        found.append(quotas.slabs["a"])
    assert found[1] < found[2] + 1 and found[3] > 90, "a has nearly all while b is idle"
    assert found[4] <= 60 and found[6] <= 15 and ADAPT_EVERY_S <= 2, "b has its part at once, and nearly all after 4 s"


def test_the_first_quotas_are_in_proportion_to_the_needs_if_all_are_known() -> None:
    guaranteed = {"a": 10, "b": 0}
    assert initial_quotas(100, guaranteed, {"a": 1.0, "b": 8.0}) == {"a": 20, "b": 80}
    assert initial_quotas(100, guaranteed, {"a": 1.0, "b": None}) == {"a": 55, "b": 45}


def test_a_model_without_a_quota_gains_slabs_when_it_waits() -> None:
    use = {"a": Use(0.0, 1), "b": Use(1.0, 0)}
    assert adapted({"a": 0, "b": 10}, {"a": 0, "b": 0}, use) == {"a": 8, "b": 2}


@given(st.data(), st.integers(1, 6))
def test_the_sum_stays_and_no_quota_falls_below_the_guaranteed_slabs(data: st.DataObject, num_models: int) -> None:
    models = [f"m{index}" for index in range(num_models)]
    guaranteed = {model: data.draw(st.integers(0, 10)) for model in models}
    quotas = initial_quotas(sum(guaranteed.values()) + data.draw(st.integers(0, 50)), guaranteed)
    for _ in range(5):
        use = {
            model: Use(data.draw(st.floats(0, 1.5)) * quotas[model], data.draw(st.integers(0, 2))) for model in models
        }
        before, quotas = quotas, adapted(quotas, guaranteed, use)
        assert sum(quotas.values()) == sum(before.values())
        for model in models:
            assert quotas[model] >= guaranteed[model]


def quotas_of(num_slabs: int, **guaranteed: int) -> Quotas:
    quotas = Quotas(num_slabs)
    for model, slabs in guaranteed.items():
        quotas.add_model(model, slabs)
    return quotas


def test_models_that_come_and_go_change_the_quotas_of_all() -> None:
    quotas = quotas_of(12, a=0, b=6)
    assert quotas.slabs == {"a": 3, "b": 9}
    quotas.add_model("c", 3)
    assert quotas.slabs == {"a": 1, "b": 7, "c": 4}
    quotas.remove_model("b")
    assert quotas.slabs == {"a": 4, "c": 8}
    quotas.check_integrity()


def test_more_than_the_pool_is_not_guaranteed() -> None:
    quotas = quotas_of(4, a=3)
    with pytest.raises(ValueError, match="5 slabs would be guaranteed; the pool has 4"):
        quotas.add_model("b", 2)
    assert quotas.slabs == {"a": 4}


def test_quotas_are_adapted_to_the_mean_use_since_the_last_time() -> None:
    quotas, used = quotas_of(20, busy=0, idle=0), {"busy": 10, "idle": 0}
    waiting = {"busy": 1, "idle": 0}
    quotas.count_use(0.0, used.__getitem__)
    quotas.adapt(0.0, waiting.__getitem__)
    for now_s in (1.0, ADAPT_EVERY_S - 1):
        quotas.count_use(now_s, used.__getitem__)
        quotas.adapt(now_s, waiting.__getitem__)
        assert quotas.slabs == {"busy": 10, "idle": 10}, "it is too early"
    quotas.count_use(ADAPT_EVERY_S, used.__getitem__)
    quotas.adapt(ADAPT_EVERY_S, waiting.__getitem__)
    assert quotas.slabs == {"busy": 19, "idle": 1}


def test_use_is_weighed_by_its_duration() -> None:
    quotas = quotas_of(20, busy=0, idle=0)
    quotas.adapt(0.0, lambda model: 1)
    quotas.count_use(0.0, lambda model: 0)
    quotas.count_use(ADAPT_EVERY_S / 2, lambda model: 10 if model == "busy" else 0)
    quotas.count_use(ADAPT_EVERY_S, lambda model: 0)
    quotas.adapt(ADAPT_EVERY_S, lambda model: 1)
    assert quotas.slabs == {"busy": 10, "idle": 10}, "half of the time full is half full on average"


def test_use_before_an_adaptation_does_not_count_for_the_next_one() -> None:
    quotas = quotas_of(20, busy=0, idle=0)
    quotas.adapt(0.0, lambda model: 0)
    quotas.count_use(0.0, lambda model: 0)
    quotas.count_use(ADAPT_EVERY_S, lambda model: 10 if model == "busy" else 0)
    quotas.adapt(ADAPT_EVERY_S, lambda model: 0)
    quotas.count_use(2 * ADAPT_EVERY_S, lambda model: 0)
    quotas.adapt(2 * ADAPT_EVERY_S, lambda model: 1)
    assert quotas.slabs == {"busy": 10, "idle": 10}


def test_the_quota_of_a_model_that_sleeps_goes_to_the_others_and_returns_when_it_wakes() -> None:
    quotas = Quotas(12)
    for model, guaranteed in (("a", 2), ("b", 0), ("c", 4)):
        quotas.add_model(model, guaranteed)
    before = dict(quotas.slabs)
    quotas.sleep("c")
    assert quotas.slabs["c"] == 0 and sum(quotas.slabs.values()) == 12
    quotas.check_integrity()
    quotas.sleep("a")
    assert quotas.slabs == {"a": 0, "b": 12, "c": 0}
    quotas.sleep("b")
    quotas.check_integrity()
    quotas.wake("c")
    assert quotas.slabs == {"a": 0, "b": 0, "c": 12}, "the only one that is awake"
    quotas.wake("a")
    quotas.wake("b")
    quotas.check_integrity()
    assert all(quotas.slabs[model] >= 2 for model in before)
    assert quotas.slabs["c"] >= 4
