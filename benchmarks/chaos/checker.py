"""Finds the violations in a run's history. Pure, so that it can be tested with histories that are wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from benchmarks.chaos.history import (
    CANCELLED,
    COMPLETED,
    ENDLESS,
    Call,
    Holdings,
    InjectedFault,
    SequenceSeen,
    Violation,
)

ERROR_SLACK_S = 3.0
"""An error that a fault allows may be seen until this long after its target served again: clients reconnect."""
FD_SLACK = 6
"""Descriptors by which a process may differ from before: connections that are opened on demand."""
THREAD_SLACK = 10
"""Threads by which a process may differ from before: pools that grow on demand."""
_BAD_LOG_LINES = (
    "Traceback (most recent call last)",
    "bug:",
    "CRITICAL",
    "never retrieved",
    "never awaited",
    "Task was destroyed",
    "Exception ignored",
    "Fatal Python error",
)


def check_call(call: Call, expected: Call, faults: Sequence[InjectedFault]) -> Iterator[Violation]:
    """Compares a call with the undisturbed one of its case.

    A call that ended early must have received a beginning of the expected output, and no other token.
    """
    name = f"case {call.request.case.number} ({call.request.case.kind}) at {call.started_at_s:.1f} s"
    if call.end == COMPLETED:
        yield from (Violation("altered", f"{name}: {what}") for what in _differences(call, expected))
        return
    if problem := _unexpected_end(call, faults):
        yield Violation("lost", f"{name}: {problem}")
    for index, seen in call.sequences.items():
        if index not in expected.sequences:
            yield Violation("altered", f"{name}: sequence {index} was not asked for")
        elif not _is_beginning(seen, expected.sequences[index]):
            yield Violation("altered", f"{name}: sequence {index} began with {seen.token_ids}, text {seen.text!r}")


def check_faults(faults: Sequence[InjectedFault]) -> Iterator[Violation]:
    """Reports faults after which the target did not come back, or did not survive as it should."""
    for fault in faults:
        is_excused = fault.is_judged_alone and any(
            other is not fault and other.at_s <= fault.ended_at_s and fault.at_s <= other.ended_at_s for other in faults
        )
        if fault.problem and not is_excused:
            yield Violation("other", f"{fault.fault} of {fault.target} at {fault.at_s:.1f} s: {fault.problem}")


def check_log(name: str, lines: Iterable[str]) -> Iterator[Violation]:
    """Reports lines that show a bug."""
    for line in lines:
        if any(bad in line for bad in _BAD_LOG_LINES):
            yield Violation("other", f"log of {name}: {line.strip()}")


def leaks(before: Holdings, after: Holdings) -> Iterator[Violation]:
    """Compares what an idle mesh held before the faults with what it holds now."""
    for name, value in after.counters.items():
        if value != 0:
            yield Violation("leaked", f"{name}: {value}")
    resources = (
        ("descriptors", before.fds, after.fds, FD_SLACK),
        ("threads", before.threads, after.threads, THREAD_SLACK),
    )
    for what, old, new, slack in resources:
        for name, value in new.items():
            if value > old.get(name, 0) + slack:
                yield Violation("leaked", f"{what} of {name}: {value}, before {old.get(name, 0)}")
    for name, count in (Counter(after.names) - Counter(before.names)).items():
        yield Violation("leaked", f"{name}: {count} more than before")
    for name, count in (Counter(before.names) - Counter(after.names)).items():
        yield Violation("other", f"{name}: {count} fewer than before")


def _unexpected_end(call: Call, faults: Sequence[InjectedFault]) -> str | None:
    """Why a call must not have ended as it did; None if it may."""
    seconds = call.ended_at_s - call.started_at_s
    if call.end == ENDLESS:
        return f"did not end within {seconds:.0f} s"
    if call.end == CANCELLED:
        return None if call.request.cancel_after_s is not None else "was cancelled, but not by its client"
    if call.end == "DeadlineExceeded" and call.request.timeout_s is not None:
        early = seconds < 0.9 * call.request.timeout_s
        return f"its deadline of {call.request.timeout_s:.2f} s passed after {seconds:.2f} s" if early else None
    if any(call.end in fault.allows and _overlaps(call, fault) for fault in faults):
        return None
    return f"ended with {call.end} after {seconds:.1f} s: {call.problem}"


def _overlaps(call: Call, fault: InjectedFault) -> bool:
    return fault.at_s <= call.ended_at_s and call.started_at_s <= fault.ended_at_s + ERROR_SLACK_S


def _differences(call: Call, expected: Call) -> Iterator[str]:
    if call.num_prompt_tokens != expected.num_prompt_tokens:
        yield f"{call.num_prompt_tokens} prompt tokens, expected {expected.num_prompt_tokens}"
    if call.request.case.options.get("seed") is not None and call.seed != expected.seed:
        yield f"reports seed {call.seed}, expected {expected.seed}"
    if call.prompt_logprobs != expected.prompt_logprobs:
        yield f"log-probabilities of the prompt: {_first_difference(call.prompt_logprobs, expected.prompt_logprobs)}"
    if call.sequences.keys() != expected.sequences.keys():
        yield f"sequences {sorted(call.sequences)}, expected {sorted(expected.sequences)}"
        return
    for index, seen in call.sequences.items():
        for what in _sequence_differences(seen, expected.sequences[index]):
            yield f"sequence {index}: {what}"


def _sequence_differences(seen: SequenceSeen, expected: SequenceSeen) -> Iterator[str]:
    if seen.token_ids != expected.token_ids:
        yield f"tokens: {_first_difference(seen.token_ids, expected.token_ids)}"
    if seen.text != expected.text:
        yield f"text {seen.text!r}, expected {expected.text!r}"
    if seen.finish != expected.finish or seen.num_finishes != 1:
        yield f"{seen.num_finishes} finishes, {seen.finish}, expected {expected.finish}"
    if seen.num_tokens != len(seen.token_ids):
        yield f"counts {seen.num_tokens} tokens, sent {len(seen.token_ids)}"
    if seen.logprobs != expected.logprobs:
        yield f"log-probabilities: {_first_difference(seen.logprobs, expected.logprobs)}"


def _first_difference(seen: Sequence[object], expected: Sequence[object]) -> str:
    """The index and the values of the first difference between two sequences that are not equal."""
    for index, (value, other) in enumerate(zip(seen, expected, strict=False)):
        if value != other:
            return f"index {index} of {len(seen)} is {value}, expected {other}"
    return f"{len(seen)}, expected {len(expected)}"


def _is_beginning(seen: SequenceSeen, expected: SequenceSeen) -> bool:
    return (
        expected.token_ids[: len(seen.token_ids)] == seen.token_ids
        and expected.text.startswith(seen.text)
        and expected.logprobs[: len(seen.logprobs)] == seen.logprobs
        and seen.finish in (None, expected.finish)
    )


def count_kinds(violations: Iterable[Violation]) -> Mapping[str, int]:
    """Violations by kind; all kinds are listed."""
    counts = Counter(violation.kind for violation in violations)
    return {kind: counts[kind] for kind in ("lost", "altered", "leaked", "other")}
