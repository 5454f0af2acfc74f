# mypy: disable-error-code="misc, no-untyped-call"
import functools
import threading

import numba
import numpy as np
import pytest

from muxmesh.engine.native.cpu.thread_team import Team, claim, claim_next, new_counters, wait


def test_counters_start_at_zero_on_cache_lines_of_their_own() -> None:
    counters = new_counters(3)
    assert not counters.any() and counters.dtype == np.int64
    assert counters.strides[0] == 2 * 64


def test_tasks_are_claimed_in_order() -> None:
    counters = new_counters(1)
    assert [claim(counters.ctypes.data, 0) for _ in range(4)] == [0, 1, 2, 3]
    assert counters.tolist() == [[4, *[0] * 15]]


def test_a_claim_of_the_next_task_counts_the_claimed_one_as_done() -> None:
    counters = new_counters(1)
    claim(counters.ctypes.data, 0)
    assert [claim_next(counters.ctypes.data, 0) for _ in range(3)] == [1, 2, 3]
    claimed, done = counters[0, 0], counters[0, 8]
    assert (claimed, done) == (4, 3)


def test_phases_do_not_share_their_counters() -> None:
    counters = new_counters(2)
    claim(counters.ctypes.data, 0)
    claim_next(counters.ctypes.data, 0)
    assert claim(counters.ctypes.data, 1) == 0
    assert counters[:, 8].tolist() == [1, 0]


@pytest.mark.parametrize("num_tasks", [0, 1])
def test_a_phase_whose_tasks_are_done_is_not_waited_for(num_tasks: int) -> None:
    counters = new_counters(1)
    claim(counters.ctypes.data, 0)
    claim_next(counters.ctypes.data, 0)
    wait(counters.ctypes.data, 0, num_tasks)


@numba.njit(nogil=True, error_model="numpy")
def _two_phases(counters, done, sums):  # type: ignore[no-untyped-def]
    """Phase 0 marks each task as done; phase 1 sums the marks."""
    task = claim(counters, 0)
    while task < len(done):
        done[task] += 1
        task = claim_next(counters, 0)
    wait(counters, 0, len(done))
    task = claim(counters, 1)
    while task < len(sums):
        sums[task] = done.sum()
        task = claim_next(counters, 1)
    wait(counters, 1, len(sums))


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_every_task_runs_once_and_after_all_tasks_of_the_phase_before(num_threads: int) -> None:
    counters, done, sums = new_counters(2), np.zeros(1000, dtype=np.int64), np.zeros(100, dtype=np.int64)
    Team(num_threads).run(functools.partial(_two_phases, counters.ctypes.data, done, sums))
    assert (done == 1).all()
    assert (sums == 1000).all()


def test_a_team_runs_the_function_in_the_caller_and_in_its_own_threads() -> None:
    together, seen = threading.Barrier(3), []

    def meet() -> None:
        seen.append(threading.get_ident())
        together.wait(timeout=60)

    Team(3).run(meet)
    assert len(set(seen)) == len(seen) == 3
    assert threading.get_ident() in seen


def test_a_team_of_one_runs_in_the_caller_only() -> None:
    seen: list[int] = []
    Team(1).run(lambda: seen.append(threading.get_ident()))
    assert seen == [threading.get_ident()]


def test_a_team_keeps_its_threads() -> None:
    team, together, seen = Team(2), threading.Barrier(2), []

    def meet() -> None:
        seen.append(threading.get_ident())
        together.wait(timeout=60)

    team.run(meet)
    team.run(meet)
    assert sorted(seen[:2]) == sorted(seen[2:])


def test_an_error_in_a_thread_of_the_team_reaches_the_caller() -> None:
    caller = threading.get_ident()

    def fail_elsewhere() -> None:
        if threading.get_ident() != caller:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Team(2).run(fail_elsewhere)


def test_a_team_needs_a_thread() -> None:
    with pytest.raises(ValueError, match="num_threads is 0; a team has at least 1 thread"):
        Team(0)
