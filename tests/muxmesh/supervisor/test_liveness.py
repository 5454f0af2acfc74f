"""When a process counts as hanging."""

import pytest

from kvstore import attach_protocol
from kvstore.attach_protocol import BEAT_EVERY_S
from muxmesh.process_state import ProcessState
from muxmesh.supervisor.liveness import (
    ASK_EVERY_CHECKS,
    CHECK_EVERY_S,
    FENCED_EXTRA_CHECKS,
    MAX_SILENT_CHECKS,
    MAX_STARTING_CHECKS,
    MAX_STOPPED_CHECKS,
    Liveness,
)

RUNNING, STOPPED, TRACED = ProcessState


def checks_until_killed(
    liveness: Liveness, limit: int, *, state: ProcessState = RUNNING, responds: bool = False
) -> int:
    """Number of checks up to the one that asks for the kill; ``limit`` + 1 if none of ``limit`` does."""
    for number in range(1, limit + 1):
        responded = responds if liveness.is_to_be_asked else None
        if liveness.check(state, responded=responded):
            return number
    return limit + 1


def responding() -> Liveness:
    liveness = Liveness()
    assert liveness.check(RUNNING, responded=True) is None
    return liveness


def test_a_process_that_responds_never_hangs() -> None:
    assert checks_until_killed(Liveness(), 1000, responds=True) == 1001


def test_a_process_that_responded_and_falls_silent_hangs() -> None:
    assert checks_until_killed(responding(), 100) == ASK_EVERY_CHECKS - 1 + MAX_SILENT_CHECKS


def test_one_late_response_ends_the_silence() -> None:
    liveness = responding()
    for _ in range(3):
        for _ in range(MAX_SILENT_CHECKS - 1):
            assert liveness.check(RUNNING, responded=False) is None
        assert liveness.check(RUNNING, responded=True) is None


def test_a_process_that_starts_may_be_silent_for_long() -> None:
    assert checks_until_killed(Liveness(), MAX_STARTING_CHECKS) == MAX_STARTING_CHECKS


@pytest.mark.parametrize("responds", [True, False])
@pytest.mark.parametrize("was_up", [True, False])
def test_a_process_that_a_signal_stopped_hangs_whether_or_not_it_is_up(responds: bool, was_up: bool) -> None:
    liveness = responding() if was_up else Liveness()
    assert checks_until_killed(liveness, 100, state=STOPPED, responds=responds) == MAX_STOPPED_CHECKS


def test_a_process_that_continues_in_time_is_left_alone() -> None:
    liveness = responding()
    for _ in range(3):
        assert checks_until_killed(liveness, MAX_STOPPED_CHECKS - 1, state=STOPPED, responds=True) == (
            MAX_STOPPED_CHECKS
        )
        assert liveness.check(RUNNING, responded=None) is None


@pytest.mark.parametrize("was_up", [True, False])
def test_a_process_with_a_debugger_never_hangs_until_the_debugger_is_gone(was_up: bool) -> None:
    liveness = responding() if was_up else Liveness()
    assert checks_until_killed(liveness, 1000, state=TRACED) == 1001
    assert checks_until_killed(liveness, 1000) == (MAX_SILENT_CHECKS if was_up else MAX_STARTING_CHECKS)


def test_a_process_that_responds_is_asked_at_intervals_and_a_silent_one_at_each_check() -> None:
    liveness = responding()
    asked = []
    for _ in range(2 * ASK_EVERY_CHECKS):
        asked.append(liveness.is_to_be_asked)
        liveness.check(RUNNING, responded=True if liveness.is_to_be_asked else None)
    assert asked == ([False] * (ASK_EVERY_CHECKS - 1) + [True]) * 2
    silent = Liveness()
    for _ in range(5):
        assert silent.is_to_be_asked
        silent.check(RUNNING, responded=False)


@pytest.mark.parametrize(
    ("was_up", "state", "reason"),
    [
        (True, STOPPED, "was stopped by a signal for 5 s"),
        (True, RUNNING, "did not respond for 8 s"),
        (False, RUNNING, "did not respond within 180 s of its start"),
    ],
)
def test_the_reason_says_what_was_seen_and_for_how_long(was_up: bool, state: ProcessState, reason: str) -> None:
    liveness = responding() if was_up else Liveness()
    seen = [liveness.check(state, responded=False) for _ in range(MAX_STARTING_CHECKS)]
    assert next(filter(None, seen)) == reason


def test_a_client_of_mps_hangs_later_than_kvstore_has_ended_it() -> None:
    patient = Liveness(FENCED_EXTRA_CHECKS)
    assert patient.check(RUNNING, responded=True) is None
    silent = ASK_EVERY_CHECKS - 1 + MAX_SILENT_CHECKS + FENCED_EXTRA_CHECKS
    assert checks_until_killed(patient, 100) == silent
    stopped = checks_until_killed(Liveness(FENCED_EXTRA_CHECKS), 100, state=STOPPED)
    assert stopped == MAX_STOPPED_CHECKS + FENCED_EXTRA_CHECKS
    ended_by_kvstore_s = BEAT_EVERY_S * attach_protocol.MAX_SILENT_CHECKS
    assert min(silent, stopped) * CHECK_EVERY_S > ended_by_kvstore_s
