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


def test_the_slabs_of_an_idle_model_move_to_one_that_waits_a_tenth_at_a_time() -> None:
    use = {"busy": Use(50.0, 3), "idle": Use(5.0, 0)}
    assert adapted({"busy": 50, "idle": 50}, {"busy": 0, "idle": 0}, use) == {"busy": 55, "idle": 45}


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


@pytest.mark.parametrize(("mean_slabs", "num_lost"), [(40.0, 5), (44.0, 3), (44.9, 2)])
def test_a_model_that_loses_slabs_keeps_headroom_over_its_use(mean_slabs: float, num_lost: int) -> None:
    use = {"busy": Use(50.0, 3), "other": Use(mean_slabs, 0)}
    changed = adapted({"busy": 50, "other": 50}, {"busy": 0, "other": 0}, use)
    assert changed == {"busy": 50 + num_lost, "other": 50 - num_lost}


def test_slabs_come_from_several_models_in_proportion_to_what_they_can_lose() -> None:
    use = {"busy": Use(100.0, 3), "idle": IDLE, "half": Use(25.0, 0)}
    changed = adapted({"busy": 100, "idle": 50, "half": 50}, dict.fromkeys(use, 0), use)
    assert changed == {"busy": 110, "idle": 43, "half": 47}


def test_several_models_that_wait_gain_in_proportion_to_their_quotas() -> None:
    use = {"large": Use(60.0, 1), "small": Use(20.0, 9), "idle": IDLE}
    changed = adapted({"large": 60, "small": 20, "idle": 20}, dict.fromkeys(use, 0), use)
    assert changed == {"large": 66, "small": 22, "idle": 12}


def test_a_model_without_a_quota_gains_one_slab_when_it_waits() -> None:
    use = {"a": Use(0.0, 1), "b": Use(1.0, 0)}
    assert adapted({"a": 0, "b": 10}, {"a": 0, "b": 0}, use) == {"a": 1, "b": 9}


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
            assert quotas[model] - before[model] <= max(1, before[model] // 10)


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
    assert quotas.slabs == {"busy": 11, "idle": 9}


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
