"""Addresses of the mesh's processes: from the runtime file and, for a process that it does not name, the registry."""

from __future__ import annotations

from muxmesh.config.runtime import MeshRuntime, ProcessKey
from muxmesh.errors import Unavailable
from muxmesh.process_registry import ProcessRegistry


class EndpointResolver:
    """Resolves (unit, role, model, replica) to an address."""

    def __init__(self, runtime: MeshRuntime, registry: ProcessRegistry) -> None:
        self._endpoints = runtime.endpoints()
        self._registry = registry

    async def address(self, key: ProcessKey) -> str:
        """Address of the process. Raises Unavailable if neither the runtime file nor the registry has it."""
        if key in self._endpoints:
            return self._endpoints[key].address
        address = await self._registry.address_of(key.name)
        if address is None:
            raise Unavailable(f"no process is registered as {key.name}")
        return address
