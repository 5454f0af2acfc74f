"""What a changed runtime file means for the processes that run with the earlier one. Decides only."""

from __future__ import annotations

from typing import Any

from muxmesh.config.runtime import MeshRuntime

_OF_ROUTERS = frozenset({"listen", "router"})
"""Fields of mesh.yaml that only routers read."""
_BY_UNIT = ("prepared", "device_uuids")


def restarts_needed(before: MeshRuntime, after: MeshRuntime) -> list[str]:
    """Names of the processes that have to restart, and of those that are no longer part of the mesh, to be stopped.

    Routers read everything. The processes of a unit read what is about their unit, and what is not about one unit.
    """
    if before == after:
        return []
    endpoints = {**before.endpoints(), **after.endpoints()}
    common_has_changed = _common(before) != _common(after)
    return [
        endpoint.name
        for key, endpoint in endpoints.items()
        if key.role == "router" or common_has_changed or _of_unit(before, key.unit) != _of_unit(after, key.unit)
    ]


def _common(runtime: MeshRuntime) -> dict[str, Any]:
    """What concerns the processes of every unit."""
    content = runtime.model_dump(exclude={"tenant_secret", *_BY_UNIT})
    content["config"] = {
        field: value for field, value in content["config"].items() if field != "units" and field not in _OF_ROUTERS
    }
    return content


def _of_unit(runtime: MeshRuntime, unit: str) -> Any:
    config = [one for one in runtime.config.units if one.name == unit]
    return config, runtime.prepared.get(unit), runtime.device_uuids.get(unit)
