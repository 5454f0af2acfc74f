"""Which unit a sequence is sent to: filter → score → pick. Pure; the router and the simulator use it.

    filter   units that can hold the sequence, that are connected, on which the model is awake: each only if some unit
             is left
    score    predicted seconds until the first token: the wait for what is ahead, and the prefill of what is not cached,
             which counts `PREFILL_WEIGHT` times
    pick     the least; among those that are nearly as good, the one that caches most of the prompt, then the one with
             the fewest sequences, then by turns

What a unit has swapped out is no part of the score: the copy of a swapped sequence serves only that sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from muxmesh.step_cost import UNMEASURED, ModelCosts

PREFILL_WEIGHT = 2.0
"""What is computed again delays the request itself, those behind it, and evicts what others would find. With 2 instead
of 1, more tokens are cached and the mean TTFT is lower in `make bench-residency`; 3 caches hardly more."""
NEARLY = 0.25
"""A unit whose score is larger by at most this part of the least one is nearly as good: it is chosen if it caches more.
Otherwise errors of the prediction would copy a prefix to every unit."""
NEARLY_S = 0.005
"""The same in seconds, for short prompts."""
CLEARLY = 0.5
"""A queued request moves to a unit where the seconds to its first token are at most this part of those where it is."""
CLEARLY_S = 0.2
"""It has to gain at least this many seconds."""
_MAX_LISTED = 3


class ChoiceReason(StrEnum):
    """Why a unit was chosen, in one word: a label of metrics."""

    ONLY = "only"
    """No other unit was left by the filter."""
    PREFIX = "prefix"
    """No other unit caches more of the prompt."""
    RECOMPUTE = "recompute"
    """Another unit caches more, but would send the first token later."""
    LOAD = "load"
    """No unit caches any of the prompt."""


@dataclass(frozen=True, slots=True)
class UnitLoad:
    """What is ahead of a new request for one model on one unit.

    ``num_sequences``: of the model, queued or running. ``mean_decode_s``: seconds of decode of one of them.
    ``prefill_s``: seconds of prefill, over all models of the unit.
    """

    num_sequences: int = 0
    mean_decode_s: float = 0.0
    prefill_s: float = 0.0

    def wait_s(self, num_slots: int) -> float:
        """Seconds until the prefill of the request begins, if ``num_slots`` sequences decode at a time.

        A sequence ends every ``mean_decode_s / num_slots`` seconds while all slots are taken. Prefill of those ahead
        runs beside the wait for a slot.
        """
        num_before = max(0, self.num_sequences - num_slots + 1)
        return max(self.prefill_s, num_before * self.mean_decode_s / num_slots)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One unit that serves the model, for one request of ``num_tokens`` known tokens.

    ``prefill_s``: of those that are not among the first ``num_cached_tokens``.
    """

    unit: str
    num_tokens: int
    num_cached_tokens: int
    wait_s: float
    prefill_s: float
    num_sequences: int
    fits: bool = True
    """The pool can hold the sequence with its longest output."""
    is_connected: bool = True
    is_awake: bool = True

    @property
    def first_token_s(self) -> float:
        """Predicted seconds until the first token."""
        return self.wait_s + self.prefill_s

    @property
    def score_s(self) -> float:
        """What the choice minimizes."""
        return self.wait_s + PREFILL_WEIGHT * self.prefill_s


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen unit. ``text``: the reason for people."""

    candidate: Candidate
    reason: ChoiceReason
    text: str


_FILTERS: Sequence[Callable[[Candidate], bool]] = (
    lambda one: one.fits,
    lambda one: one.is_connected,
    lambda one: one.is_awake,
)


def choose(candidates: Sequence[Candidate], turn: int) -> Choice:
    """Chooses one of ``candidates``, of which there is at least one. ``turn``: increases with each choice."""
    left = filtered(candidates)
    least_s = min(one.score_s for one in left)
    bound_s = least_s + max(NEARLY * least_s, NEARLY_S)
    near = [(index, one) for index, one in enumerate(left) if one.score_s <= bound_s]
    _, best = min(
        near, key=lambda pair: (-pair[1].num_cached_tokens, pair[1].num_sequences, (pair[0] - turn) % len(left))
    )
    return Choice(best, _reason(best, left), _text(best, left, len(candidates)))


def choose_better(candidates: Sequence[Candidate], current: Candidate, turn: int) -> Choice | None:
    """The unit to which a request that is queued at ``current`` moves; None: it stays.

    ``candidates`` are the other units. A request leaves a unit that the filter would not keep.
    """
    left = filtered([*candidates, current])
    others = [one for one in left if one is not current]
    if not others:
        return None
    choice = choose(others, turn)
    if current not in left:
        return choice
    now_s, then_s = current.first_token_s, choice.candidate.first_token_s
    return choice if then_s <= CLEARLY * now_s and now_s - then_s >= CLEARLY_S else None


def filtered(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The units between which the score decides; there is one if ``candidates`` has one."""
    left = list(candidates)
    for keeps in _FILTERS:
        left = [one for one in left if keeps(one)] or left
    return left


def assumed_costs(measured: Sequence[ModelCosts | None]) -> list[ModelCosts]:
    """Step costs of one model by unit. A unit that has not measured its own is taken to be as fast as another."""
    assumed = next((costs for costs in measured if costs is not None), UNMEASURED)
    return [costs or assumed for costs in measured]


def prefill_s(costs: ModelCosts, num_tokens: int, num_cached_tokens: int, chunk: int) -> float:
    """Seconds to compute the tokens ``[num_cached_tokens, num_tokens)`` in steps of ``chunk`` tokens."""
    return costs.prefill.prefill_s(num_tokens - num_cached_tokens, num_cached_tokens, chunk)


def _reason(best: Candidate, left: Sequence[Candidate]) -> ChoiceReason:
    if len(left) == 1:
        return ChoiceReason.ONLY
    most = max(one.num_cached_tokens for one in left)
    if not most:
        return ChoiceReason.LOAD
    return ChoiceReason.PREFIX if best.num_cached_tokens == most else ChoiceReason.RECOMPUTE


def _text(best: Candidate, left: Sequence[Candidate], num_candidates: int) -> str:
    """For people: what was known of the chosen unit and of the best of the others."""
    text = f"{best.unit}: {_figures(best)}"
    others = sorted((one for one in left if one is not best), key=lambda one: one.score_s)
    listed = "; ".join(f"{one.unit}: {_figures(one)}" for one in others[:_MAX_LISTED])
    num_removed = num_candidates - len(left)
    removed = f"; not available: {num_removed}" if num_removed else ""
    return f"{text}; {listed}{removed}" if listed else f"{text}{removed}"


def _figures(one: Candidate) -> str:
    waits = f"waits {one.wait_s:.3g} s" if one.wait_s else "free"
    return f"{one.num_cached_tokens} of {one.num_tokens} tokens cached, {waits}, prefill {one.prefill_s:.3g} s"
