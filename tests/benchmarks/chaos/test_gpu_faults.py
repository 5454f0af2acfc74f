"""What chaos demands of the processes of a GPU after a fault of the device."""

import pytest

from benchmarks.chaos.gpu_faults import group_problem

BEFORE = {"kvstore/unit0": 10, "prefill/tiny": 11, "decode/tiny": 12}
AFTER = {"redis": 2, "kvstore/unit0": 10, "prefill/tiny": 21, "decode/tiny": 22}


def test_new_workers_of_the_same_kvstore_are_right() -> None:
    assert group_problem(BEFORE, AFTER) == ""


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kvstore/unit0": 20}, "kvstore/unit0 was restarted"),
        ({"decode/tiny": 12}, "decode/tiny goes on"),
        ({"prefill/tiny": 11}, "prefill/tiny goes on"),
    ],
)
def test_an_old_worker_or_a_new_kvstore_is_a_problem(changes: dict[str, int], problem: str) -> None:
    assert group_problem(BEFORE, {**AFTER, **changes}).startswith(problem)


def test_a_process_that_is_missing_is_a_problem() -> None:
    assert group_problem(BEFORE, {"kvstore/unit0": 10, "prefill/tiny": 21}) == "decode/tiny does not run any more"
