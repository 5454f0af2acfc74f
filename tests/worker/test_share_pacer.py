"""The CPU time of a worker that computes steps of random length, against its share."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.share_pacer import BURST_S, SharePacer


def use_over_time(cores: float, steps: list[float], threads: int, idle: list[float]) -> list[tuple[float, float]]:
    """(time, CPU time used) before and after each step. ``steps``: CPU seconds of each; ``idle``: seconds after it."""
    pacer, now_s, cpu_s = SharePacer(cores), 100.0, 7.0
    points = []
    for step_cpu_s, idle_s in zip(steps, idle, strict=True):
        delay_s = pacer.delay_s(now_s, cpu_s)
        now_s += delay_s
        assert delay_s == 0 or pacer.delay_s(now_s, cpu_s) == pytest.approx(0, abs=1e-9)
        points.append((now_s, cpu_s))
        now_s, cpu_s = now_s + step_cpu_s / threads, cpu_s + step_cpu_s
        points.append((now_s, cpu_s))
        now_s += idle_s
    return points


@pytest.mark.parametrize("percent", [25, 50, 75])
def test_a_busy_worker_uses_its_share_of_two_cores_and_no_more_than_5_percent_above(percent: int) -> None:
    rng, cores = random.Random(1), 2 * percent / 100
    steps = [rng.uniform(0.005, 0.1) for _ in range(2000)]
    points = use_over_time(cores, steps, 2, [0.0] * 2000)
    assert points[-1][1] - points[0][1] == pytest.approx(cores * (points[-1][0] - points[0][0]), rel=0.02)
    window_s = 4.0
    for start, (start_s, start_cpu_s) in enumerate(points[::2]):
        inside = [cpu_s for now_s, cpu_s in points[2 * start : 2 * start + 400] if now_s <= start_s + window_s]
        assert inside[-1] - start_cpu_s <= (percent / 100 + 0.05) * 2 * window_s


@given(
    st.floats(0.1, 4.0),
    st.lists(st.tuples(st.floats(0.0, 1.0), st.sampled_from([0.0, 0.01, 30.0])), min_size=1, max_size=30),
)
def test_over_any_time_use_is_at_most_the_share_a_burst_and_one_step(
    cores: float, steps: list[tuple[float, float]]
) -> None:
    points = use_over_time(cores, [step for step, _ in steps], 4, [idle for _, idle in steps])
    for first, (start_s, start_cpu_s) in enumerate(points):
        for index in range(first + 1, len(points), 2):
            now_s, cpu_s = points[index]
            allowed_s = cores * (now_s - start_s + BURST_S) + max(step for step, _ in steps)
            assert cpu_s - start_cpu_s <= allowed_s + cores * 0.001


def test_a_worker_below_its_share_never_waits() -> None:
    points = use_over_time(1.0, [0.1] * 50, 2, [0.06] * 50)
    assert [start for start, _ in points[::2]] == pytest.approx([100.0 + 0.11 * index for index in range(50)])


def test_what_was_used_before_the_first_step_does_not_count() -> None:
    assert SharePacer(0.5).delay_s(10.0, 1000.0) == 0


def test_what_a_worker_used_to_load_its_model_does_not_count() -> None:
    pacer = SharePacer(0.5)
    assert [pacer.delay_s(10.0, 1.0), pacer.delay_s(11.0, 3.0)] == [0, pytest.approx(2.9)]
    pacer.restart()
    assert pacer.delay_s(12.0, 9.0) == pytest.approx(2.9), "what it owes for its steps stays"
    assert pacer.delay_s(15.0, 9.0) == 0
