"""The workers of a unit, and whether each of them can take one more sequence. Pure.

A decode worker whose batch is full takes a sequence that would displace another one there. Until it does, after its
prefill, the displaced one computes; so more sequences than slots may count as batched, each with a victim of its own.
Between tenants the other one may also be in prefill: otherwise one that fills all slots at once would keep the others
waiting for all of its prompts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from muxmesh.batch_choice import Reach
from muxmesh.scheduling_policy import SortKey
from muxmesh.types import Role, SchedulingState

_ROLES = tuple(Role)


class EngineState(StrEnum):
    """What the engine of a worker is told to be, and what it reports to be."""

    AWAKE = "awake"
    """It computes."""
    ASLEEP = "asleep"
    """It computes nothing; its weights stay mapped, if they were."""
    DROPPED = "dropped"
    """As asleep, and its weights are not mapped."""


ASLEEP = frozenset({EngineState.ASLEEP, EngineState.DROPPED})


@dataclass(slots=True)
class WorkerRecord:
    """An attached worker. ``name`` includes its incarnation, so a restarted worker has another name.

    ``ready``: the worker has reported that it accepts requests. ``is_retired``: its model has been removed, so it
    serves none, even if a model of that name is added later. ``told``: what its engine was told last to be, when
    it attached or by one of ``num_told`` commands. ``engine``: what its engine is; None until it has reported that it
    followed the latest command.
    """

    name: str
    role: Role
    model: str
    address: str
    pid: int
    ready: bool = False
    is_retired: bool = False
    told: EngineState = EngineState.AWAKE
    engine: EngineState | None = EngineState.AWAKE
    num_told: int = 0

    def tell(self, engine: EngineState) -> None:
        """Records a command to the engine. The state of the engine is unknown until `report`."""
        self.told, self.engine = engine, None
        self.num_told += 1

    def report(self, number: int) -> None:
        """Records that the engine followed command ``number``. Has no effect if there was a later command."""
        if number == self.num_told:
            self.engine = self.told

    @property
    def is_serving(self) -> bool:
        """Whether it can compute requests of its model."""
        return self.ready and not self.is_retired and self.engine is EngineState.AWAKE


class SlotLimits(Protocol):
    """How many sequences one worker of a model takes."""

    @property
    def max_num_seqs(self) -> int:
        """Sequences in the batch of one worker."""

    @property
    def resident_limit(self) -> int:
        """Sequences of one worker that hold token blocks, paused ones included."""


def ready_workers(workers: Iterable[WorkerRecord], role: Role, model: str) -> list[WorkerRecord]:
    """The workers of a role and model that can compute, the youngest first if ``workers`` are in the order of their
    attachment.
    """
    return [worker for worker in workers if worker.model == model and worker.role is role and worker.is_serving][::-1]


class WorkerSlots:
    """Owns the counts of sequences per worker during one pass of admission."""

    def __init__(
        self,
        workers: Sequence[WorkerRecord],
        limits: Mapping[str, SlotLimits],
        batched: Counter[str],
        resident: Counter[str],
        reach_of: Callable[[str], Reach],
        prefilling_of: Callable[[str, str], Sequence[int]] = lambda model, worker: (),
    ) -> None:
        """``limits``: by model. ``batched``, ``resident``: leases by worker, see `LeaseTable.count_assigned`.

        ``reach_of``: which sequences displace those that a decode worker computes. ``prefilling_of``: see
        `LeaseTable.prefilling_for`.
        """
        self._prefilling_of = prefilling_of
        self._prefilling: dict[str, Sequence[int]] = {}
        self._limits = limits
        self._batched = batched
        self._resident = resident
        self._workers = workers
        self._reach_of = reach_of
        self._reaches: dict[str, Reach] = {}
        self._ready_of: dict[str, list[list[WorkerRecord]]] = {}
        """Model → its ready workers by role, once asked for."""

    def has_slot(self, model: str, scheduling: SchedulingState, worker: str | None = None) -> bool:
        """Whether ``worker`` can batch one more sequence; None: whether any pair of workers of the model can.

        That is so if a slot is free that no paused sequence will take, or if the sequence would displace another one
        from the batch.
        """
        if worker is not None:
            return self._can_batch(worker, model, scheduling)
        prefills, decodes = self._ready(model)
        return bool(prefills) and any(self._can_batch(decode.name, model, scheduling) for decode in decodes)

    def ends_before(self, model: str, key: SortKey) -> bool:
        """Whether `has_slot` is False for each sequence of ``model`` at ``key`` in the order, or later."""
        prefills, decodes = self._ready(model)
        return not prefills or not any(self._may_batch(decode.name, model, key) for decode in decodes)

    def has_workers(self, model: str) -> bool:
        """Whether a prefill and a decode worker of the model are ready."""
        return all(self._ready(model))

    def has_room(self, worker: str, model: str) -> bool:
        """Whether ``worker`` may have token blocks of one more sequence, with a slot or without."""
        return self._resident[worker] < self._limits[model].resident_limit

    def choose(self, model: str, scheduling: SchedulingState) -> tuple[WorkerRecord, WorkerRecord]:
        """The prefill and the decode worker for one more sequence: the least loaded, the youngest of equals."""
        prefills, decodes = self._ready(model)
        able = [decode for decode in decodes if self._can_batch(decode.name, model, scheduling)]
        return self._least_loaded(prefills), self._least_loaded(able)

    def take(self, *workers: str) -> None:
        """Counts one more sequence of each worker."""
        for worker in workers:
            self._batched[worker] += 1
            self._resident[worker] += 1

    def _ready(self, model: str) -> list[list[WorkerRecord]]:
        ready = self._ready_of.get(model)
        if ready is None:
            ready = self._ready_of[model] = [ready_workers(self._workers, role, model) for role in _ROLES]
        return ready

    def _can_batch(self, worker: str, model: str, scheduling: SchedulingState) -> bool:
        limits = self._limits[model]
        if (is_free := self._has_free_slot(worker, limits)) is not None:
            return is_free
        num_claimed = self._num_claimed(worker, limits)
        if self._reach(worker).may_displace_more_than(num_claimed, scheduling):
            return True
        if not scheduling.standing.has_rivals:
            return False
        prefilling = self._prefilling_for(worker, model)
        return len(prefilling) - bisect_right(prefilling, scheduling.precedence) > num_claimed

    def _may_batch(self, worker: str, model: str, key: SortKey) -> bool:
        """Whether it may be that ``worker`` can batch a sequence at ``key`` in the order, or later."""
        is_free = self._has_free_slot(worker, self._limits[model])
        if is_free is not None:
            return is_free
        prefilling = self._prefilling_for(worker, model)
        return not self._reach(worker).ends_before(key) or (bool(prefilling) and key[0] < prefilling[-1])

    def _has_free_slot(self, worker: str, limits: SlotLimits) -> bool | None:
        """Whether any sequence has a slot; None: only one that displaces another one."""
        num_resident = self._resident[worker]
        if num_resident >= limits.resident_limit:
            return False
        if num_resident < limits.max_num_seqs:
            return True
        return False if self._num_claimed(worker, limits) >= max(1, limits.max_num_seqs // 2) else None

    def _num_claimed(self, worker: str, limits: SlotLimits) -> int:
        """Sequences that will displace others once their prefill is done."""
        return max(0, self._batched[worker] - limits.max_num_seqs)

    def _reach(self, worker: str) -> Reach:
        reach = self._reaches.get(worker)
        if reach is None:
            reach = self._reaches[worker] = self._reach_of(worker)
        return reach

    def _prefilling_for(self, worker: str, model: str) -> Sequence[int]:
        found = self._prefilling.get(worker)
        if found is None:
            found = self._prefilling[worker] = self._prefilling_of(model, worker)
        return found

    def _least_loaded(self, workers: Sequence[WorkerRecord]) -> WorkerRecord:
        return min(workers, key=lambda worker: self._batched[worker.name])
