"""What a changed runtime file means for the processes that run with the earlier one. Decides only."""

from __future__ import annotations

from typing import Any

from muxmesh.config.arbiter_config import ArbiterConfig
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.runtime import MeshRuntime, PreparedModel, ProcessKey

_OF_ROUTERS = frozenset({"access", "listen", "router", "routers", "tls"})
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
        if key.role == "kvstore" and _arbiter(before, key.unit) != _arbiter(after, key.unit):
            return True
        return bool(_of_unit(before, key.unit) != _of_unit(after, key.unit))

    changed = {
        "every router" if key.role == "router" else endpoint.name: None
        for key, endpoint in {**earlier, **later}.items()
        if has_changed(key)
    }
    return list(changed)


def with_model(runtime: MeshRuntime, unit: str, model: ModelConfig, prepared: PreparedModel) -> MeshRuntime:
    """The runtime with one more model at the end of ``unit``. Its configuration is not checked here."""
    models = (*runtime.unit(unit).models, model)
    return _with_models(runtime, unit, models, {**runtime.prepared[unit], model.name: prepared})


def without_model(runtime: MeshRuntime, unit: str, model: str) -> MeshRuntime:
    """The runtime without a model of ``unit``, which has others."""
    models = tuple(one for one in runtime.unit(unit).models if one.name != model)
    prepared = {name: one for name, one in runtime.prepared[unit].items() if name != model}
    return _with_models(runtime, unit, models, prepared)


def _with_models(
    runtime: MeshRuntime, unit: str, models: tuple[ModelConfig, ...], prepared: dict[str, PreparedModel]
) -> MeshRuntime:
    units = tuple(
        one.model_copy(update={"models": models}) if one.name == unit else one for one in runtime.config.units
    )
    config = runtime.config.model_copy(update={"units": units})
    return runtime.model_copy(update={"config": config, "prepared": {**runtime.prepared, unit: prepared}})


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
    """What concerns all processes of one unit: its settings, but not SLOs.

    Routers read SLOs, and the unit's kvstore only whether there are any: `UnitConfig.resolved_arbiter`.
    """
    config = [
        one.model_dump(exclude={"models": {"__all__": {"slo"}}}) for one in runtime.config.units if one.name == unit
    ]
    return config, runtime.prepared.get(unit), runtime.device_uuids.get(unit)


def _arbiter(runtime: MeshRuntime, unit: str) -> ArbiterConfig:
    return runtime.unit(unit).resolved_arbiter(runtime.uses_mps(unit))
