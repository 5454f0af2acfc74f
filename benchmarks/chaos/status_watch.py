"""Looks at the status of a mesh all the time. Each look makes every unit check the integrity of its memory."""

from __future__ import annotations

import asyncio

from benchmarks.chaos.history import Violation
from muxmesh.client import MeshClient
from muxmesh.errors import DeadlineExceeded, MeshError, Unavailable
from muxmesh.v1 import mesh_pb2

_LOOK_EVERY_S = 0.5


class StatusWatch:
    """Owns what was seen in the status. Counters of a worker that restarts begin again: the last values of each
    incarnation are added.
    """

    def __init__(self, client: MeshClient) -> None:
        self.violations: list[Violation] = []
        self.num_looks = 0
        self._client = client
        self._swapped_bytes: dict[str, int] = {}

    @property
    def swapped_bytes(self) -> int:
        """Bytes that were swapped out, as far as it was seen."""
        return sum(self._swapped_bytes.values())

    async def run(self) -> None:
        """Looks until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                self._add(await self._client.status())
            except (Unavailable, DeadlineExceeded):
                continue
            except MeshError as error:
                self.violations.append(Violation("other", f"status: {error!r}"))

    def _add(self, status: mesh_pb2.GetStatusResponse) -> None:
        self.num_looks += 1
        for unit in status.units:
            for worker in unit.workers:
                self._swapped_bytes[f"{unit.unit} {worker.name} {worker.pid}"] = worker.swap_out_bytes
