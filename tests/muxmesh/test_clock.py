from muxmesh.clock import ManualClock, SystemClock


def test_a_manual_clock_changes_only_through_advance() -> None:
    clock = ManualClock(100.0)
    assert (clock.monotonic_s(), clock.unix_s()) == (100.0, 100.0)
    clock.advance(2.5)
    clock.advance(0.5)
    assert (clock.monotonic_s(), clock.unix_s()) == (103.0, 103.0)


def test_the_monotonic_time_of_the_system_never_decreases() -> None:
    clock = SystemClock()
    times_s = [clock.monotonic_s() for _ in range(1000)]
    assert times_s == sorted(times_s)


def test_the_unix_time_of_the_system_is_not_its_monotonic_time() -> None:
    clock = SystemClock()
    year_2024_s = 1_704_067_200
    assert clock.unix_s() > year_2024_s > clock.monotonic_s()
