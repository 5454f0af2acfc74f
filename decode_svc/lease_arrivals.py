"""Matches Decode calls with the leases that prefill hands off to this worker. Either may arrive first.

A lease whose call does not arrive within `ORPHAN_GRACE_S` is an orphan: its router died or cancelled the request in
between. A call that arrives after its lease was given up fails.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from muxmesh.errors import WorkerLost
from muxmesh.types import Lease

ORPHAN_GRACE_S = 0.3
_MAX_ORPHANS = 4096
"""Ids of given-up leases that are remembered, for calls that arrive late."""


class LeaseArrivals:
    """Owns leases that wait for their call, and calls that wait for their lease. Invariant: never both for one id."""

    def __init__(self, orphaned: Callable[[Lease], None]) -> None:
        """``orphaned``: called with each lease that no call takes; it releases the lease."""
        self._orphaned = orphaned
        self._calls: dict[int, asyncio.Future[Lease]] = {}
        self._parked: dict[int, tuple[Lease, asyncio.TimerHandle]] = {}
        self._orphans: deque[int] = deque(maxlen=_MAX_ORPHANS)

    def lease_arrived(self, lease: Lease) -> None:
        """Passes the lease to its call, or parks it until the grace has passed."""
        lease_id = lease.ref.lease_id
        call = self._calls.pop(lease_id, None)
        if call is not None and not call.done():
            call.set_result(lease)
            return
        timer = asyncio.get_running_loop().call_later(ORPHAN_GRACE_S, self._expire, lease_id)
        self._parked[lease_id] = (lease, timer)

    async def wait_for(self, lease_id: int) -> Lease:
        """Waits for the lease. Raises WorkerLost if it has arrived and was given up. At most one call waits for an id.

        If the caller is cancelled at the moment of the arrival, the lease is an orphan.
        """
        if lease_id in self._orphans:
            raise WorkerLost(f"lease {lease_id} was given up: its call came too late")
        if lease_id in self._parked:
            lease, timer = self._parked.pop(lease_id)
            timer.cancel()
            return lease
        call: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self._calls[lease_id] = call
        try:
            return await call
        except asyncio.CancelledError:
            if call.done() and not call.cancelled():  # the lease arrived before the cancel took effect
                self._orphaned(call.result())
            raise
        finally:
            self._calls.pop(lease_id, None)

    def _expire(self, lease_id: int) -> None:
        lease, _ = self._parked.pop(lease_id)
        self._orphans.append(lease_id)
        self._orphaned(lease)
