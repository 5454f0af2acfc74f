"""The workers of a unit, and how many more sequences each of them can take. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from muxmesh.types import Role


@dataclass(slots=True)
class WorkerRecord:
    """An attached worker. ``name`` includes its incarnation, so a restarted worker has another name.

    ``ready``: the worker has reported that it accepts requests. ``is_retired``: its model has been removed, so it
    serves none, even if a model of that name is added later.
    """

    name: str
    role: Role
    model: str
    address: str
    pid: int
    ready: bool = False
    is_retired: bool = False


class SlotLimits(Protocol):
    """How many sequences one worker of a model takes."""

    @property
    def max_num_seqs(self) -> int:
        """Sequences in the batch of one worker."""

    @property
    def resident_limit(self) -> int:
        """Sequences of one worker that hold token blocks, paused ones included."""


def ready_workers(workers: Iterable[WorkerRecord], role: Role, model: str) -> list[WorkerRecord]:
    """The ready workers of a role and model, the youngest first if ``workers`` are in the order of attachment."""
    serving = [worker for worker in workers if worker.ready and not worker.is_retired]
    return [worker for worker in serving if worker.role is role and worker.model == model][::-1]


class WorkerSlots:
    """Owns the counts of sequences per worker during one pass of admission."""

    def __init__(
        self,
        workers: Sequence[WorkerRecord],
        limits: Mapping[str, SlotLimits],
        batched: Counter[str],
        resident: Counter[str],
    ) -> None:
        """``limits``: by model. ``batched``, ``resident``: leases by worker, see `LeaseTable.count_assigned`."""
        self._limits = limits
        self._batched = batched
        self._resident = resident
        self._ready = {model: [ready_workers(workers, role, model) for role in Role] for model in limits}

    def has_slot(self, model: str, worker: str | None = None) -> bool:
        """Whether ``worker`` can take one more sequence; None: whether any pair of workers of the model can."""
        if worker is not None:
            return self._is_free(worker, model)
        prefills, decodes = self._ready[model]
        return bool(prefills) and any(self._is_free(decode.name, model) for decode in decodes)

    def has_workers(self, model: str) -> bool:
        """Whether a prefill and a decode worker of the model are ready."""
        return all(self._ready[model])

    def choose(self, model: str) -> tuple[WorkerRecord, WorkerRecord]:
        """The prefill and the decode worker for one more sequence: the least loaded, the youngest of equals."""
        prefills, decodes = self._ready[model]
        free = [decode for decode in decodes if self._is_free(decode.name, model)]
        return self._least_loaded(prefills), self._least_loaded(free)

    def take(self, *workers: str) -> None:
        """Counts one more sequence of each worker."""
        self._batched.update(workers)
        self._resident.update(workers)

    def _is_free(self, worker: str, model: str) -> bool:
        limits = self._limits[model]
        return self._batched[worker] < limits.max_num_seqs and self._resident[worker] < limits.resident_limit

    def _least_loaded(self, workers: Sequence[WorkerRecord]) -> WorkerRecord:
        return min(workers, key=lambda worker: self._batched[worker.name])
