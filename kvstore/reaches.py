"""Which queued requests would displace a sequence of each decode worker, kept up to date between admissions. Pure."""

from __future__ import annotations

from kvstore.leases import LeaseTable
from muxmesh.batch_choice import Reach
from muxmesh.scheduling_policy import SchedulingPolicy


class Reaches:
    """Owns the `Reach` of each decode worker that was asked for.

    Invariant: it is that of the sequences that the worker computes, by the changes of their leases, unless the policy's
    order changes with time: then it is made anew each time.
    """

    def __init__(self, leases: LeaseTable, policy: SchedulingPolicy) -> None:
        self._leases, self._policy = leases, policy
        self._reaches: dict[str, Reach] = {}

    def of(self, decode_worker: str, unix_s: float) -> Reach:
        """The reach into the batch of a decode worker at ``unix_s``."""
        if not self._policy.is_timeless:
            return self._anew(decode_worker, unix_s)
        changes = self._leases.changes_in(decode_worker)
        reach = self._reaches.get(decode_worker)
        if reach is None or changes is None:
            reach = self._reaches[decode_worker] = self._anew(decode_worker, unix_s)
        else:
            for lease_id, record in changes.items():
                reach.update(lease_id, record)
        return reach

    def drop(self, worker: str) -> None:
        """Forgets a worker that has exited."""
        self._reaches.pop(worker, None)

    def _anew(self, decode_worker: str, unix_s: float) -> Reach:
        batch = {one.lease.ref.lease_id: one for one in self._leases.decoding_in(decode_worker)}
        return Reach(batch, self._policy, unix_s)
