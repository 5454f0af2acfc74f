"""Resolves processes of the mesh to addresses: from the runtime file, else from the process registry."""

from __future__ import annotations

from muxmesh.config.runtime import MeshRuntime, ProcessKey
from muxmesh.errors import Unavailable
from muxmesh.process_registry import ProcessRegistry


class EndpointResolver:
    """Resolves a `ProcessKey` to an address. The runtime file takes precedence over the registry."""

    def __init__(self, runtime: MeshRuntime, registry: ProcessRegistry) -> None:
        self._runtime = runtime
        self._endpoints = runtime.endpoints()
        self._registry = registry

    async def address(self, key: ProcessKey) -> str:
        """Address at which routers call the process. Raises Unavailable if runtime file and registry lack it."""
        if key in self._endpoints:
            return self._endpoints[key].remote_address
        name = self._runtime.display_name(key)
        address = await self._registry.address_of(name)
        if address is None:
            raise Unavailable(f"no process is registered as {name}")
        return address
