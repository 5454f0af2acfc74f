"""Quotas: what is guaranteed stays, the sum stays, and they go where they are used."""

from hypothesis import given
from hypothesis import strategies as st

from kvstore.quotas import Use, adapted, initial_quotas


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 40))
def test_all_slabs_are_given_out_equally_over_what_is_guaranteed(guaranteed: list[int], more: int) -> None:
    least = {f"m{index}": slabs for index, slabs in enumerate(guaranteed)}
    quotas = initial_quotas(sum(guaranteed) + more, least)
    assert sum(quotas.values()) == sum(guaranteed) + more
    extra = [quotas[model] - least[model] for model in least]
    assert max(extra) - min(extra) <= 1


def test_what_is_idle_goes_to_who_waits_a_tenth_at_a_time() -> None:
    use = {"busy": Use(50.0, 3), "idle": Use(5.0, 0)}
    assert adapted({"busy": 50, "idle": 50}, {"busy": 0, "idle": 0}, use) == {"busy": 55, "idle": 45}
    assert adapted({"busy": 50, "idle": 50}, {"busy": 0, "idle": 48}, use) == {"busy": 52, "idle": 48}


def test_nobody_who_waits_for_slots_only_takes_memory() -> None:
    quotas = {"a": 50, "b": 50}
    assert adapted(quotas, {"a": 0, "b": 0}, {"a": Use(10.0, 9), "b": Use(0.0, 0)}) == quotas
    assert adapted(quotas, {"a": 0, "b": 0}, {"a": Use(50.0, 0), "b": Use(0.0, 0)}) == quotas
    assert adapted(quotas, {"a": 0, "b": 0}, {"a": Use(50.0, 5), "b": Use(49.0, 5)}) == quotas


def test_a_model_without_a_quota_gets_one_when_it_waits() -> None:
    use = {"a": Use(0.0, 1), "b": Use(1.0, 0)}
    assert adapted({"a": 0, "b": 10}, {"a": 0, "b": 0}, use) == {"a": 1, "b": 9}


@given(st.data(), st.integers(1, 6))
def test_the_sum_stays_and_nobody_gets_less_than_guaranteed(data: st.DataObject, num_models: int) -> None:
    models = [f"m{index}" for index in range(num_models)]
    guaranteed = {model: data.draw(st.integers(0, 10)) for model in models}
    quotas = initial_quotas(sum(guaranteed.values()) + data.draw(st.integers(0, 50)), guaranteed)
    for _ in range(5):
        use = {
            model: Use(data.draw(st.floats(0, 1.5)) * quotas[model], data.draw(st.integers(0, 2))) for model in models
        }
        before, quotas = quotas, adapted(quotas, guaranteed, use)
        assert sum(quotas.values()) == sum(before.values())
        assert all(quotas[model] >= guaranteed[model] for model in models)
