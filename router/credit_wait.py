"""Waits for the credit of a sequence: at the unit that is chosen when it is queued, or at one that turns out better.

A sequence moves at once when the connection to its unit breaks, and later if another unit would clearly start it sooner
(`router.unit_choice`). It keeps its arrival, so its position in the order of the next unit is that of its age.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from muxmesh.background_task import end
from muxmesh.clock import Clock
from muxmesh.types import NO_WAITS, EngineRequest, Waits
from router.admission_client import Credit, UnitLost
from router.assigned_work import AssignedSequence
from router.units import ChosenUnit, Units

RECHOOSE_EVERY_S = 0.5
"""A queued sequence looks for a better unit this often."""


@dataclass(slots=True)
class _Place:
    """Where a sequence counts now."""

    chosen: ChosenUnit
    sequence: AssignedSequence


@dataclass(frozen=True, slots=True)
class CreditedAttempt:
    """A credit, whose ``waits`` are those at all units where the sequence was queued, and the unit that issued it."""

    credit: Credit
    chosen: ChosenUnit
    units: Units
    sequence: AssignedSequence

    def prefilled(self, num_cached_tokens: int) -> None:
        """The prompt is computed; ``num_cached_tokens`` of it were in the prefix cache."""
        self.chosen.link.assigned.prefilled(self.sequence)
        self.units.note_cached(self.chosen, num_cached_tokens)


class CreditWait:
    """Waits for credits of any unit."""

    def __init__(self, units: Units, clock: Clock) -> None:
        self._units = units
        self._clock = clock

    @asynccontextmanager
    async def credited(self, request: EngineRequest, first: ChosenUnit | None = None) -> AsyncIterator[CreditedAttempt]:
        """Waits for a credit, which is returned when the block ends. ``first``: the unit, if it is chosen already.

        The sequence counts as assigned to one unit throughout: a credit arrives before its task goes on, and another
        sequence may choose a unit in between. Raises what `UnitAdmission.wait_for_credit` raises.
        """
        chosen = first if first is not None and first.link.is_connected else self._units.choose(request)
        place = _Place(chosen, chosen.assign(request.model))
        try:
            credit = await self._wait(request, place)
            place.chosen.link.assigned.credited(place.sequence)
            try:
                yield CreditedAttempt(credit, place.chosen, self._units, place.sequence)
            finally:
                place.chosen.link.admission.return_credit(credit)
        finally:
            place.chosen.link.assigned.remove(place.sequence)

    async def _wait(self, request: EngineRequest, place: _Place) -> Credit:
        """The credit. ``place`` is where the sequence has moved."""
        waits = NO_WAITS
        while True:
            queued_at_s = self._clock.monotonic_s()
            try:
                credit = await self._wait_at_unit(request, place)
            except UnitLost:
                waits = waits.plus(Waits(worker_s=self._clock.monotonic_s() - queued_at_s))
                self._move(request, place, self._units.choose(request))
                continue
            if credit is not None:
                return replace(credit, waits=waits.plus(credit.waits))
            waits = waits.plus(Waits(order_s=self._clock.monotonic_s() - queued_at_s))

    async def _wait_at_unit(self, request: EngineRequest, place: _Place) -> Credit | None:
        """The credit of the unit of ``place``; None if the sequence has moved. Raises UnitLost."""
        chosen, has_others = place.chosen, len(self._units.serving(request.model)) > 1
        wait = chosen.link.admission.wait_for_credit(
            request.model,
            request.tenant,
            request.scheduling,
            chosen.demand,
            request.tenant_weight,
            leaves_when_lost=True,
        )
        if not has_others:
            return await wait
        waiting, is_used = asyncio.create_task(wait), False
        try:
            while True:
                await asyncio.wait({waiting}, timeout=RECHOOSE_EVERY_S)
                if waiting.done():
                    is_used = True
                    return waiting.result()
                if (better := self._units.choose_better(request, chosen)) is not None:
                    self._move(request, place, better)
                    return None
        finally:
            await end(waiting)
            if not is_used and not waiting.cancelled() and waiting.exception() is None:
                chosen.link.admission.return_credit(waiting.result())

    @staticmethod
    def _move(request: EngineRequest, place: _Place, chosen: ChosenUnit) -> None:
        """Counts the sequence at another unit from now on, so that others see it there at once."""
        sequence = chosen.assign(request.model)
        place.chosen.link.assigned.remove(place.sequence)
        place.chosen, place.sequence = chosen, sequence
