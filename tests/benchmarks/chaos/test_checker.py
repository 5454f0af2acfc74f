"""The checker finds each kind of violation: histories are changed in one respect, and it has to notice."""

import math
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.chaos.cases import Case, Request
from benchmarks.chaos.checker import (
    ERROR_SLACK_S,
    FD_SLACK,
    THREAD_SLACK,
    check_call,
    check_faults,
    check_log,
    count_kinds,
    leaks,
)
from benchmarks.chaos.history import CANCELLED, COMPLETED, ENDLESS, Call, Holdings, InjectedFault, SequenceSeen
from muxmesh.client import Candidate, Delta, Finish, TokenLogprobs

CASE = Case(3, "seeded", "small", "Hello", {"seed": 5, "num_sequences": 2})
LOGPROBS = tuple(TokenLogprobs(Candidate(token, -1.0, 1), ()) for token in (7, 8, 9))
SEQUENCES = {
    0: SequenceSeen((7, 8, 9), "abc", 3, LOGPROBS, Finish("length", 3), 1),
    1: SequenceSeen((7, 6), "ax", 2, (), Finish("stop", 2, "x"), 1),
}
EXPECTED = Call(Request(CASE), 0.0, 0.5, COMPLETED, "", SEQUENCES, 6, 5, LOGPROBS)
ROUTER_KILLED = InjectedFault("kill -9", "router", 10.0, 14.0, frozenset({"Unavailable"}))
IDLE = Holdings({"unit0: leased bytes": 0}, {"router": 30}, {"router": 12}, ("process router", "socket router.sock"))


def kinds(call: Call, *faults: InjectedFault) -> list[str]:
    return [violation.kind for violation in check_call(call, EXPECTED, faults)]


def with_sequence(call: Call, index: int, **changes: Any) -> Call:
    return replace(call, sequences={**call.sequences, index: replace(call.sequences[index], **changes)})


def ended(end: str, started_at_s: float, ended_at_s: float, **request: Any) -> Call:
    """A call that received the first tokens of its first sequence."""
    begun = {0: SequenceSeen((7, 8), "ab", 2, LOGPROBS[:2])}
    return replace(
        EXPECTED,
        request=Request(CASE, **request),
        started_at_s=started_at_s,
        ended_at_s=ended_at_s,
        end=end,
        sequences=begun,
    )


def test_an_equal_call_is_no_violation_whatever_its_times_and_restarts() -> None:
    assert not kinds(replace(EXPECTED, started_at_s=50.0, ended_at_s=70.0, num_restarts=4))


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": (7, 8, 1)},
        {"token_ids": (7, 8)},
        {"token_ids": (7, 8, 8, 9)},
        {"token_ids": (8, 7, 9)},
        {"text": "abd"},
        {"text": "abcc"},
        {"finish": Finish("length", 4)},
        {"finish": Finish("stop", 3, "c")},
        {"finish": None, "num_finishes": 0},
        {"num_finishes": 2},
        {"num_tokens": 2},
        {"logprobs": LOGPROBS[:2]},
    ],
)
def test_a_completed_sequence_that_differs_in_anything_is_altered(changes: dict[str, Any]) -> None:
    assert set(kinds(with_sequence(EXPECTED, 0, **changes))) == {"altered"}


@pytest.mark.parametrize(
    "changes",
    [
        {"num_prompt_tokens": 7},
        {"num_prompt_tokens": None},
        {"seed": 6},
        {"prompt_logprobs": LOGPROBS[1:]},
        {"sequences": {0: SEQUENCES[0]}},
        {"sequences": {**SEQUENCES, 2: SEQUENCES[1]}},
    ],
)
def test_a_completed_call_with_other_reports_or_sequences_is_altered(changes: dict[str, Any]) -> None:
    assert kinds(replace(EXPECTED, **changes)) == ["altered"]


def test_a_request_without_a_seed_may_get_any_seed() -> None:
    greedy = Request(replace(CASE, options={"temperature": 0}))
    assert not list(check_call(replace(EXPECTED, request=greedy, seed=9), EXPECTED, ()))


def test_a_call_without_an_end_is_lost() -> None:
    assert kinds(ended(ENDLESS, 9.0, 159.0), ROUTER_KILLED) == ["lost"]


@pytest.mark.parametrize("error", ["Unavailable", "InternalError", "Overloaded", "DeadlineExceeded", "RequestAborted"])
def test_an_error_without_a_cause_is_lost(error: str) -> None:
    assert kinds(ended(error, 20.0, 25.0)) == ["lost"]


@pytest.mark.parametrize("error", ["InternalError", "Overloaded", "DeadlineExceeded"])
def test_a_fault_allows_only_the_errors_that_it_names(error: str) -> None:
    assert kinds(ended(error, 9.0, 11.0), ROUTER_KILLED) == ["lost"]


@pytest.mark.parametrize(
    ("started_at_s", "ended_at_s", "is_lost"),
    [
        (9.0, 10.0, False),
        (9.0, 9.9, True),
        (12.0, 12.1, False),
        (14.0 + ERROR_SLACK_S, 18.0, False),
        (14.1 + ERROR_SLACK_S, 18.0, True),
    ],
)
def test_a_fault_allows_an_error_only_while_it_lasts(started_at_s: float, ended_at_s: float, is_lost: bool) -> None:
    assert kinds(ended("Unavailable", started_at_s, ended_at_s), ROUTER_KILLED) == ["lost"] * is_lost


def test_a_fault_that_never_ended_allows_its_errors_for_ever() -> None:
    assert not kinds(ended("Unavailable", 500.0, 501.0), replace(ROUTER_KILLED, ended_at_s=math.inf))


def test_a_cancel_is_lost_unless_its_client_made_it() -> None:
    assert not kinds(ended(CANCELLED, 1.0, 2.0, cancel_after_s=1.0))
    assert kinds(ended(CANCELLED, 1.0, 2.0)) == ["lost"]


def test_a_deadline_is_lost_unless_it_was_asked_for_and_has_passed() -> None:
    assert not kinds(ended("DeadlineExceeded", 1.0, 3.0, timeout_s=2.0))
    assert kinds(ended("DeadlineExceeded", 1.0, 1.5, timeout_s=2.0)) == ["lost"]


@pytest.mark.parametrize(
    "changes",
    [{"token_ids": (7, 9)}, {"text": "b"}, {"logprobs": LOGPROBS[1:]}, {"finish": Finish("length", 2)}],
)
def test_what_a_call_received_before_an_early_end_must_be_a_beginning(changes: dict[str, Any]) -> None:
    call = ended(CANCELLED, 1.0, 2.0, cancel_after_s=1.0)
    assert kinds(with_sequence(call, 0, **changes)) == ["altered"]


def test_a_sequence_that_was_not_requested_is_altered() -> None:
    call = ended(CANCELLED, 1.0, 2.0, cancel_after_s=1.0)
    assert kinds(replace(call, sequences={2: SequenceSeen()})) == ["altered"]


def test_deltas_add_up_to_what_a_client_has_seen() -> None:
    deltas = [Delta(0, "a", (7,), 1, LOGPROBS[:1]), Delta(0, "bc", (8, 9), 2, LOGPROBS[1:], finish=Finish("length", 3))]
    seen = SequenceSeen()
    for delta in deltas:
        seen = seen.plus(delta)
    assert seen == SEQUENCES[0]
    assert seen.plus(deltas[1]).num_finishes == 2


def test_a_fault_that_is_not_repaired_is_a_violation() -> None:
    assert not list(check_faults([ROUTER_KILLED]))
    broken = replace(ROUTER_KILLED, ended_at_s=math.inf, problem="router does not serve 120 s later")
    (violation,) = check_faults([broken])
    assert violation.kind == "other"
    assert "router does not serve" in violation.text


def test_a_short_stop_that_is_not_survived_is_excused_only_by_a_fault_at_the_same_time() -> None:
    stop = InjectedFault("stop", "decode/a", 20.0, 23.0, problem="was restarted", is_judged_alone=True)
    unit_killed = InjectedFault("kill -9", "kvstore/unit0", 21.0, 25.0)
    assert len(list(check_faults([stop, ROUTER_KILLED]))) == 1
    assert not list(check_faults([stop, unit_killed]))


@pytest.mark.parametrize(
    "changes",
    [
        {"counters": {"unit0: leased bytes": 4096}},
        {"fds": {"router": 31 + FD_SLACK}},
        {"threads": {"router": 13 + THREAD_SLACK}},
        {"fds": {"router": 30, "supervisor": 1 + FD_SLACK}},
        {"names": (*IDLE.names, "zombie")},
        {"names": (*IDLE.names, "process router")},
    ],
)
def test_whatever_is_held_beyond_the_idle_mesh_is_leaked(changes: dict[str, Any]) -> None:
    (violation,) = leaks(IDLE, replace(IDLE, **changes))
    assert violation.kind == "leaked"


def test_a_mesh_that_holds_what_it_held_leaks_nothing() -> None:
    assert not list(leaks(IDLE, replace(IDLE, fds={"router": 30 + FD_SLACK}, threads={"router": 12 + THREAD_SLACK})))


def test_a_process_or_a_socket_that_is_missing_is_a_violation() -> None:
    (violation,) = leaks(IDLE, replace(IDLE, names=("socket router.sock",)))
    assert violation.kind == "other"


@pytest.mark.parametrize(
    "line",
    [
        "Traceback (most recent call last):",
        "ERROR muxmesh.rpc.server: bug: an RPC failed",
        "ERROR asyncio: Task exception was never retrieved",
        "sys:1: RuntimeWarning: coroutine 'f' was never awaited",
    ],
)
def test_a_log_line_that_shows_a_bug_is_a_violation(line: str) -> None:
    (violation,) = check_log("router.log", ["INFO router: ready", line])
    assert "router.log" in violation.text


def test_violations_are_counted_by_kind() -> None:
    found = [*check_log("a.log", ["bug: x"]), *check_call(ended(ENDLESS, 0.0, 150.0), EXPECTED, ())]
    assert count_kinds(found) == {"lost": 1, "altered": 0, "leaked": 0, "other": 1}
