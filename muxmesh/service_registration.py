"""The registration of a service in the process registry, while it serves."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from muxmesh.clock import Clock
from muxmesh.config.runtime import Endpoint, MeshRuntime
from muxmesh.lifecycle import Stop
from muxmesh.process_registry import ProcessRegistry


def registered_service(
    runtime: MeshRuntime, endpoint: Endpoint, stop: Stop, clock: Clock, address: str = ""
) -> AbstractAsyncContextManager[None]:
    """Registers the service of ``endpoint`` while the block runs. See `ProcessRegistry.registered`.

    ``address``: where others call it; empty: its ``remote_address``. A service that gives up leaves its record, as
    after a crash.
    """
    return ProcessRegistry(runtime.redis_url, runtime.config.mesh_id, clock).registered(
        endpoint.name,
        address or endpoint.remote_address,
        counts_restarts=runtime.counts_own_restarts(endpoint.name),
        has_failed=lambda: stop.has_given_up,
    )
