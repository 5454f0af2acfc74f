"""What a changed runtime file means for the processes that run with the earlier one. Decides only."""

from __future__ import annotations

from typing import Any

from muxmesh.config.runtime import MeshRuntime, ProcessKey

_OF_ROUTERS = frozenset({"listen", "router"})
"""Fields of mesh.yaml that only routers read."""
_OF_THE_SUPERVISOR = {"metrics"}
"""Fields of mesh.yaml that no service reads."""
_BY_UNIT = ("prepared", "device_uuids")


def restarts_needed(before: MeshRuntime, after: MeshRuntime) -> list[str]:
    """Names of the processes that have to restart, and of those that are no longer part of the mesh, to be stopped.

    Routers read everything. The processes of a unit read what is about their unit, and what is not about one unit.
    """
    if _of_services(before) == _of_services(after):
        return []
    earlier, later = before.endpoints(), after.endpoints()
    common_has_changed = _common(before) != _common(after)

    def has_changed(key: ProcessKey) -> bool:
        if key.role == "router" or common_has_changed or earlier.get(key) != later.get(key):
            return True  # a worker has another name and socket if the model is on another number of units
        return bool(_of_unit(before, key.unit) != _of_unit(after, key.unit))

    endpoints = {**earlier, **later}
    return [
        "every router" if key.role == "router" else endpoint.name
        for key, endpoint in endpoints.items()
        if has_changed(key)
    ]


def _of_services(runtime: MeshRuntime) -> dict[str, Any]:
    return runtime.model_dump(exclude={"config": _OF_THE_SUPERVISOR})


def _common(runtime: MeshRuntime) -> dict[str, Any]:
    """What concerns the processes of every unit."""
    content = _of_services(runtime)
    for field in ("tenant_secret", *_BY_UNIT):
        del content[field]
    for field in ("units", *_OF_ROUTERS):
        del content["config"][field]
    return content


def _of_unit(runtime: MeshRuntime, unit: str) -> Any:
    config = [one for one in runtime.config.units if one.name == unit]
    return config, runtime.prepared.get(unit), runtime.device_uuids.get(unit)
