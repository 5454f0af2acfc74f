"""Which calls are sent again, how often and when."""

from random import Random

import pytest

from muxmesh.client.retries import NO_RETRIES, Attempts, Retries
from muxmesh.errors import InvalidRequest, MeshError, Overloaded, RequestAborted, TlsFailed, Unavailable, WorkerLost


@pytest.mark.parametrize("error", [Unavailable("gone"), WorkerLost("died")])
def test_delays_double_up_to_a_limit_and_are_spread_over_their_upper_half(error: MeshError) -> None:
    retries = Retries(max_retries=6, initial_delay_s=0.25, max_delay_s=2.0)
    for number, longest_s in enumerate([0.25, 0.5, 1.0, 2.0, 2.0, 2.0]):
        delays_s = [retries.delay_s(error, number, Random(seed)) for seed in range(50)]
        assert all(delay_s is not None and longest_s / 2 <= delay_s <= longest_s for delay_s in delays_s)
        assert len(set(delays_s)) == 50
    assert retries.delay_s(error, 6, Random(0)) is None


def test_any_number_of_retries_has_a_delay() -> None:
    delay_s = Retries(max_retries=10**9, max_delay_s=2.0).delay_s(Unavailable("gone"), 10**8, Random(0))
    assert delay_s is not None and 1.0 <= delay_s <= 2.0


def test_equal_seeds_give_equal_delays() -> None:
    error = Unavailable("gone")
    assert Retries().delay_s(error, 0, Random(3)) == Retries().delay_s(error, 0, Random(3))


def test_an_overloaded_mesh_is_asked_again_after_its_own_delay_and_only_on_request() -> None:
    full = Overloaded("full", retry_after_s=5.0)
    assert Retries().delay_s(full, 0, Random(0)) is None
    delay_s = Retries(initial_delay_s=0.5, on_overload=True).delay_s(full, 0, Random(0))
    assert delay_s is not None and 5.25 <= delay_s <= 5.5


@pytest.mark.parametrize("error", [InvalidRequest("text", "is empty"), RequestAborted("closed"), TlsFailed("x")])
def test_other_errors_are_final(error: MeshError) -> None:
    assert Retries(on_overload=True).delay_s(error, 0, Random(0)) is None


def test_no_retries_means_none() -> None:
    assert NO_RETRIES.delay_s(Unavailable("gone"), 0, Random(0)) is None


def test_a_call_is_repeated_until_its_retries_are_used_up() -> None:
    attempts = Attempts(Retries(max_retries=2, initial_delay_s=1.0), Random(0), deadline_s=None)
    assert attempts.remaining_s(5.0) is None
    for _ in range(2):
        assert attempts.delay_before_retry_s(Unavailable("gone"), now_s=5.0) > 0
    with pytest.raises(Unavailable, match="again"):
        attempts.delay_before_retry_s(Unavailable("again"), now_s=5.0)


def test_a_retry_that_would_begin_after_the_deadline_is_not_waited_for() -> None:
    attempts = Attempts(Retries(initial_delay_s=1.0), Random(0), deadline_s=10.0)
    assert attempts.remaining_s(8.5) == 1.5 and attempts.remaining_s(11.0) == 0.0
    assert 0.5 <= attempts.delay_before_retry_s(Unavailable("gone"), now_s=8.5) <= 1.0
    with pytest.raises(Unavailable, match="late"):
        attempts.delay_before_retry_s(Unavailable("late"), now_s=9.6)
