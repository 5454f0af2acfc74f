"""Which models of a unit are awake and which sleep. Pure; time is an argument.

    state            its workers                                   its queued requests
    awake            compute                                       get credits
    falling_asleep   finish its leases, then are told to sleep     wait
    asleep           compute nothing; its KV memory is free        wake it
    waking           load or map the weights                       wait

    from             to               when
    awake            falling_asleep   idle for `AwakeLimits.idle_sleep_s`; evicted by a model that has to wake; `sleep`
    waking           falling_asleep   evicted after `STUCK_S`; `sleep`
    falling_asleep   asleep           no lease is left, and all of its workers report that they sleep
    falling_asleep   awake            evicted, has leases, and no model needs its space, or another one is idle
    asleep           waking           a request is queued, or `wake`; and fewer than `max_awake` models are not asleep
    waking           awake            a prefill and a decode worker are ready and report that they are awake

Eviction: an idle model falls asleep at once, the least recently used first. If every model is busy, the one with the
fewest requests falls asleep after the waiting model has waited for `PATIENCE_S` and it itself was awake for as long:
it gets no more credits, its running sequences finish. It stays awake after all if another one becomes idle before, or
the waiting requests are withdrawn. So models that have to share the limit take turns, and none waits for ever. Models
that wait are served in the order in which they began to wait. A pinned model is never evicted. One that is waking for
`STUCK_S`, because its workers do not start for example, is evicted like a busy one, and waits again behind the others.

This module knows workers by what they report. It does not know leases, memory or how workers are told.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from kvstore.worker_slots import ASLEEP, EngineState, WorkerRecord
from muxmesh.types import Role

PATIENCE_S = 5.0
"""A model that has to wake waits this long for an idle one to make space, before a busy one has to."""
STUCK_S = 60.0
"""A model that is waking for this long may be evicted. Far longer than waking takes if its workers start."""


class ModelState(StrEnum):
    """The states of a model; see the table at the head of this module."""

    AWAKE = "awake"
    FALLING_ASLEEP = "falling_asleep"
    ASLEEP = "asleep"
    WAKING = "waking"


@dataclass(frozen=True, slots=True)
class AwakeLimits:
    """``max_awake``: how many models are not asleep at a time; None: all. ``idle_sleep_s``: None: no model sleeps for
    being idle.
    """

    max_awake: int | None = None
    idle_sleep_s: float | None = None


NO_LIMITS = AwakeLimits()


@dataclass(frozen=True, slots=True)
class ModelUse:
    """Leases and queued requests of a model at present."""

    num_leases: int = 0
    num_queued: int = 0

    @property
    def is_idle(self) -> bool:
        return not self.num_leases and not self.num_queued


_UNUSED = ModelUse()


@dataclass(frozen=True, slots=True)
class WorkerCommand:
    """A worker is to be told what its engine has to be."""

    worker: str
    engine: EngineState
    number: int
    """Counts the commands of the worker. Its report has the same number: a report of an earlier one does not count."""


@dataclass(slots=True)
class ModelRecord:
    """One model. ``since_s``: monotonic time at which its state began. ``waiting_since_s``: since when it has to wake;
    None: it does not. ``sleeping``: what its workers are to be while it sleeps. ``is_drained``: it falls asleep, and
    its last lease has ended. ``is_evicted``: it falls asleep for another model. ``was_used``: it was not idle at the
    last update. ``wanted_by_command``: it is to wake by command, and is not awake yet.
    """

    name: str
    state: ModelState
    since_s: float
    last_used_s: float
    is_pinned: bool = False
    waiting_since_s: float | None = None
    sleeping: EngineState = EngineState.ASLEEP
    is_drained: bool = False
    is_evicted: bool = False
    was_used: bool = False
    wanted_by_command: bool = False
    num_sleeps: int = 0
    num_wakes: int = 0
    waking_s: float = 0.0
    """Seconds for which it was waking, over all of its wakes that are complete."""
    last_waking_s: float = 0.0

    @property
    def engine(self) -> EngineState:
        """What its workers are to be now."""
        has_to_sleep = self.is_drained or self.state is ModelState.ASLEEP
        return self.sleeping if has_to_sleep else EngineState.AWAKE

    def enter(self, state: ModelState, now_s: float) -> None:
        self.state, self.since_s, self.is_drained, self.is_evicted = state, now_s, False, False
        if state is ModelState.AWAKE:
            self.waiting_since_s, self.wanted_by_command = None, False
        elif state is ModelState.FALLING_ASLEEP:
            self.sleeping = EngineState.ASLEEP


@dataclass(slots=True)
class StateChanges:
    """What `ModelStates.update` decided. ``returned``: models whose KV memory the caller takes back. ``claiming``:
    models that get their quota again. ``commands``: to be sent to workers.
    """

    returned: list[str] = field(default_factory=list)
    claiming: list[str] = field(default_factory=list)
    commands: list[WorkerCommand] = field(default_factory=list)


class ModelStates:
    """Owns the states of a unit's models.

    Invariant: at most ``limits.max_awake`` models are not asleep. The head of this module has the transitions.
    """

    def __init__(self, limits: AwakeLimits = NO_LIMITS) -> None:
        self._limits = limits
        self.models: dict[str, ModelRecord] = {}
        self._due_s: float | None = None

    def add_model(self, name: str, is_pinned: bool, starts_asleep: bool, now_s: float) -> None:
        """Adds a model: asleep if it is to start so, or if no more models may be awake."""
        is_awake = not starts_asleep and self._num_free() > 0
        state = ModelState.AWAKE if is_awake else ModelState.ASLEEP
        self.models[name] = ModelRecord(name, state, now_s, now_s, is_pinned, sleeping=EngineState.DROPPED)

    def remove_model(self, name: str) -> None:
        del self.models[name]

    def admits(self, model: str) -> bool:
        """Whether queued requests of a model may get credits."""
        return self.models[model].state is ModelState.AWAKE

    def engine_of(self, model: str) -> EngineState:
        """What a worker of the model is to be that attaches now."""
        return self.models[model].engine

    def sleep(self, model: str, now_s: float, drop_weights: bool = False) -> None:
        """The command: the model falls asleep, pinned or not, when its leases have ended; a queued request wakes it
        afterwards. ``drop_weights``: its workers also unmap their weights, even if it sleeps already.
        """
        record = self.models[model]
        record.wanted_by_command = record.is_evicted = False
        if record.state in (ModelState.AWAKE, ModelState.WAKING):
            record.enter(ModelState.FALLING_ASLEEP, now_s)
        if drop_weights:
            record.sleeping = EngineState.DROPPED

    def wake(self, model: str) -> None:
        """The command: the model wakes as if it had a queued request."""
        record = self.models[model]
        record.wanted_by_command = record.state is not ModelState.AWAKE

    def update(self, now_s: float, use: Mapping[str, ModelUse], workers: Collection[WorkerRecord]) -> StateChanges:
        """Makes the transitions that are due. Marks the workers in ``commands`` as told.

        ``use``: of each model that has leases or queued requests.
        """
        changes = StateChanges()
        for name, record in self.models.items():
            self._observe(record, use.get(name, _UNUSED), now_s)
        if self._limits == NO_LIMITS and all(one.state is ModelState.AWAKE for one in self.models.values()):
            self._due_s = None
            return changes
        self._begin_idle_sleeps(now_s)
        self._settle(now_s, use, workers, changes)
        self._make_space(now_s, use)
        self._settle(now_s, use, workers, changes)  # an evicted model without workers sleeps at once
        self._wake_models(now_s, changes)
        self._due_s = self._next_due_s()
        changes.commands.extend(self._commands(workers))
        return changes

    def next_change_s(self) -> float | None:
        """Monotonic time at which `update` has to be called even if nothing happens; None: at no time."""
        return self._due_s

    def check_integrity(self) -> None:
        """Proves the invariant. Raises AssertionError."""
        assert self._num_free() >= 0, "more models are awake than may be"

    @staticmethod
    def _observe(record: ModelRecord, use: ModelUse, now_s: float) -> None:
        is_used = not use.is_idle
        if is_used or record.was_used:
            record.last_used_s = now_s
        record.was_used = is_used
        if record.state is ModelState.AWAKE or not (use.num_queued or record.wanted_by_command):
            record.waiting_since_s = None
        elif record.waiting_since_s is None:
            record.waiting_since_s = now_s

    def _begin_idle_sleeps(self, now_s: float) -> None:
        for record in self.models.values():
            idle_until_s = self._idle_until_s(record)
            if idle_until_s is not None and idle_until_s <= now_s:
                record.enter(ModelState.FALLING_ASLEEP, now_s)

    def _idle_until_s(self, record: ModelRecord) -> float | None:
        """When the model falls asleep if it stays idle; None: it does not."""
        limit_s = self._limits.idle_sleep_s
        if limit_s is None or record.is_pinned or record.was_used or record.state is not ModelState.AWAKE:
            return None
        return record.last_used_s + limit_s

    def _settle(
        self, now_s: float, use: Mapping[str, ModelUse], workers: Collection[WorkerRecord], changes: StateChanges
    ) -> None:
        """Makes the transitions that leases and workers have completed."""
        for name, record in self.models.items():
            if record.state is ModelState.FALLING_ASLEEP:
                if not record.is_drained and not use.get(name, _UNUSED).num_leases:
                    record.is_drained = True
                    changes.returned.append(name)
                if record.is_drained and all(worker.engine in ASLEEP for worker in workers_of(name, workers)):
                    record.enter(ModelState.ASLEEP, now_s)
                    record.num_sleeps += 1
            elif record.state is ModelState.WAKING and _can_serve(workers_of(name, workers)):
                record.num_wakes += 1
                record.last_waking_s = now_s - record.since_s
                record.waking_s += record.last_waking_s
                record.enter(ModelState.AWAKE, now_s)
                record.last_used_s = now_s

    def _waiting(self) -> list[ModelRecord]:
        """The sleeping models that have to wake, in the order in which they get space."""
        waiting = [
            (record.waiting_since_s, record.name, record)
            for record in self.models.values()
            if record.waiting_since_s is not None and record.state is ModelState.ASLEEP
        ]
        return [record for _, _, record in sorted(waiting, key=lambda one: one[:2])]

    def _without_space(self) -> list[ModelRecord]:
        """The waiting models that wait for another one to fall asleep, while none does for them."""
        num_coming = self._num_coming()
        return [record for index, record in enumerate(self._waiting()) if index >= num_coming]

    def _make_space(self, now_s: float, use: Mapping[str, ModelUse]) -> None:
        """Lets a model fall asleep for each waiting one, beyond those that fall asleep already or may be awake.

        One that still has leases stays awake after all if no model waits for its space any more, or another is idle.
        """
        draining = [record for record in self.models.values() if record.is_evicted and not record.is_drained]
        num_needed = len(draining) + len(self._waiting()) - self._num_coming()
        for index, record in enumerate(draining):
            idle = self._choose_idle() if index < num_needed else None
            if index >= num_needed or idle is not None:
                record.enter(ModelState.AWAKE, now_s)
            if idle is not None:
                self._evict(idle, now_s)
        for waiting in self._without_space():
            victim = self._choose_idle() or self._choose_busy(waiting, now_s, use)
            if victim is None:
                break
            self._evict(victim, now_s)

    def _evict(self, record: ModelRecord, now_s: float) -> None:
        record.enter(ModelState.FALLING_ASLEEP, now_s)
        record.is_evicted = True
        if record.waiting_since_s is not None:  # it was waking
            record.waiting_since_s = now_s

    def _choose_idle(self) -> ModelRecord | None:
        """The least recently used idle model."""
        idle = [
            record
            for record in self.models.values()
            if record.state is ModelState.AWAKE and not record.is_pinned and not record.was_used
        ]
        return min(idle, key=lambda record: record.last_used_s, default=None)

    def _choose_busy(self, waiting: ModelRecord, now_s: float, use: Mapping[str, ModelUse]) -> ModelRecord | None:
        """After the patience of the waiting model, the one with the fewest requests that may be evicted."""
        assert waiting.waiting_since_s is not None
        if now_s < waiting.waiting_since_s + PATIENCE_S:
            return None
        busy = (
            record
            for record in self.models.values()
            if (from_s := self._evictable_from_s(record)) is not None and now_s >= from_s
        )

        def num_requests_and_age(record: ModelRecord) -> tuple[int, float]:
            used = use.get(record.name, _UNUSED)
            return used.num_leases + used.num_queued, record.since_s

        return min(busy, key=num_requests_and_age, default=None)

    def _evictable_from_s(self, record: ModelRecord) -> float | None:
        """From when it may be evicted though it is not idle; None: not in this state."""
        if record.is_pinned or record.state not in (ModelState.AWAKE, ModelState.WAKING):
            return None
        return record.since_s + (PATIENCE_S if record.state is ModelState.AWAKE else STUCK_S)

    def _wake_models(self, now_s: float, changes: StateChanges) -> None:
        for record in self._waiting():
            if self._num_free() <= 0:
                break
            record.enter(ModelState.WAKING, now_s)
            changes.claiming.append(record.name)

    def _num_free(self) -> float:
        """How many more models may be awake."""
        if self._limits.max_awake is None:
            return math.inf
        return self._limits.max_awake - sum(r.state is not ModelState.ASLEEP for r in self.models.values())

    def _num_coming(self) -> float:
        """How many more models may be awake once those that fall asleep sleep."""
        return self._num_free() + sum(r.state is ModelState.FALLING_ASLEEP for r in self.models.values())

    def _next_due_s(self) -> float | None:
        """When a model has been idle for long enough, or a waiting one may evict a busy one."""
        times = [due_s for record in self.models.values() if (due_s := self._idle_until_s(record)) is not None]
        evictable_s = [from_s for one in self.models.values() if (from_s := self._evictable_from_s(one)) is not None]
        if evictable_s:
            times += [
                max(record.waiting_since_s + PATIENCE_S, min(evictable_s))
                for record in self._without_space()
                if record.waiting_since_s is not None
            ]
        return min(times, default=None)

    def _commands(self, workers: Iterable[WorkerRecord]) -> Iterable[WorkerCommand]:
        for worker in workers:
            record = self.models.get(worker.model)
            if record is not None and not worker.is_retired and worker.told is not record.engine:
                worker.tell(record.engine)
                yield WorkerCommand(worker.name, worker.told, worker.num_told)


def workers_of(model: str, workers: Iterable[WorkerRecord]) -> list[WorkerRecord]:
    """The workers of a model that count for its state: all but those of an earlier model of its name."""
    return [worker for worker in workers if worker.model == model and not worker.is_retired]


def _can_serve(workers: Iterable[WorkerRecord]) -> bool:
    """Whether a prefill and a decode worker can compute."""
    return {worker.role for worker in workers if worker.is_serving} == set(Role)
