"""The result of a run, as people and scripts read it."""

from benchmarks.chaos.cases import Case, Request
from benchmarks.chaos.history import CANCELLED, COMPLETED, Call, InjectedFault, Violation
from benchmarks.chaos.report import counts_line, fault_line, recovery_lines

FAULTS = [
    InjectedFault("kill -9", "decode/a", 1.0, 3.0),
    InjectedFault("kill -9", "decode/b", 5.0, 9.0),
    InjectedFault("kill -9", "decode/b", 9.5, 9.5, note="did not run"),
    InjectedFault("hang", "router", 20.0, float("inf"), problem="was not killed within 25 s"),
]


def test_a_fault_is_shown_with_its_recovery_or_its_problem() -> None:
    lines = [" ".join(fault_line(fault).split()) for fault in FAULTS]
    assert lines[0] == "1.0 s kill -9 decode/a recovered after 2.0 s"
    assert lines[2] == "9.5 s kill -9 decode/b did not run"
    assert lines[3] == "20.0 s hang router was not killed within 25 s"


def test_recovery_times_are_those_of_faults_that_happened_and_ended() -> None:
    (line,) = recovery_lines(FAULTS)
    assert "2 times, recovered after 3.0 s (median), 4.0 s (longest)" in line


def test_the_last_line_counts_requests_violations_and_faults_by_role() -> None:
    request = Request(Case(0, "greedy", "a", "Hello", {}))
    calls = [Call(request, 0.0, 1.0, end, num_restarts=1) for end in (COMPLETED, COMPLETED, CANCELLED)]
    line = counts_line(
        7, 60.0, {"requests": 3, "retried": 0}, calls, FAULTS, [Violation("altered", "x"), Violation("other", "y")]
    )
    assert line == (
        "chaos seed 7, 60 s: requests 3, completed 2, retried 0, cancelled 1, past deadline 0, restarts 3, lost 0, "
        "altered 1, leaked 0, other 1, faults 4, kill -9 decode 3, hang router 1"
    )
