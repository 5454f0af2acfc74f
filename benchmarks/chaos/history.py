"""What happened in a run: what clients saw, which faults were injected, what the mesh held. Frozen values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.chaos.cases import Request
from muxmesh.client import Delta, Finish, TokenLogprobs

COMPLETED, CANCELLED, ENDLESS = "completed", "cancelled", "endless"
"""Ends of a call that are not the name of an error. ENDLESS: the client gave up after `LoadSize.call_limit_s`."""


@dataclass(frozen=True, slots=True)
class SequenceSeen:
    """What a client received of one output sequence. ``num_tokens``: the sum of the deltas' own counts."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    num_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: Finish | None = None
    num_finishes: int = 0

    def plus(self, delta: Delta) -> SequenceSeen:
        return SequenceSeen(
            self.token_ids + delta.token_ids,
            self.text + delta.text,
            self.num_tokens + delta.num_tokens,
            self.logprobs + delta.logprobs,
            delta.finish or self.finish,
            self.num_finishes + (delta.finish is not None),
        )


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a client. ``end``: see `COMPLETED`, or the name of the error, whose text is ``problem``.

    Times are in seconds since the load started. ``num_restarts`` is what the mesh reported.
    """

    request: Request
    started_at_s: float
    ended_at_s: float
    end: str
    problem: str = ""
    sequences: Mapping[int, SequenceSeen] = field(default_factory=dict)
    num_prompt_tokens: int | None = None
    seed: int | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_restarts: int = 0


@dataclass(frozen=True, slots=True)
class InjectedFault:
    """A fault as it happened. ``allows``: the names of the errors that clients may legitimately see meanwhile.

    ``ended_at_s``: when the target served again; infinite if it did not. ``problem``: what went wrong, or "".
    ``is_judged_alone``: the problem counts only if no other fault happened meanwhile (`faults.NotSurvived`).
    ``note`` is for people.
    """

    fault: str
    target: str
    at_s: float
    ended_at_s: float
    allows: frozenset[str] = frozenset()
    problem: str = ""
    is_judged_alone: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a mesh holds at one moment.

    ``counters``: bytes, leases, queued requests and the like by name, which are 0 in an idle mesh. ``fds`` and
    ``threads``: by process name. ``names``: processes, sockets, folders and shared memory.
    """

    counters: Mapping[str, int]
    fds: Mapping[str, int]
    threads: Mapping[str, int]
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that must not happen."""

    kind: Literal["lost", "altered", "leaked", "other"]
    text: str
