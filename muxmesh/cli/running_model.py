"""`muxmesh model ps|sleep|wake|load|unload`: commands for the models of a running mesh, over its private sockets.

They are for the user of the mesh on its machine, or in one of its containers: no port takes them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from pathlib import Path
from typing import Any

from muxmesh.cli.common import ProgressBar, current_dir, print_json
from muxmesh.cli.runtime_lookup import find_runtime
from muxmesh.cli.status import message_dict
from muxmesh.cli.text_table import print_table
from muxmesh.clock import SystemClock
from muxmesh.config.runtime import ADMIN_SUFFIX, SUPERVISOR, MeshRuntime
from muxmesh.durations import duration_text
from muxmesh.errors import ConfigError, DeadlineExceeded, InvalidRequest, Unavailable
from muxmesh.internal.v1 import admin_pb2, admin_pb2_grpc
from muxmesh.local_path import local_path
from muxmesh.rpc.channels import internal_channel
from muxmesh.rpc.status_codes import response_of
from muxmesh.v1 import mesh_pb2, mesh_pb2_grpc

_MIB = 1024 * 1024
_STATUS_S = 10.0


def run(arguments: argparse.Namespace) -> int:
    """Runs the subcommand in ``arguments.action``; returns the exit code.

    Raises ConfigError if there is no such mesh, Unavailable if it does not run, and the error of the command.
    """
    runtime = find_runtime(arguments)
    actions = {"ps": _ps, "sleep": _sleep, "wake": _wake, "load": _load, "unload": _unload}
    return actions[arguments.action](runtime, arguments)


def _ps(runtime: MeshRuntime, arguments: argparse.Namespace) -> int:
    status = _call_router(runtime, mesh_pb2_grpc.MeshStub, "GetStatus", mesh_pb2.GetStatusRequest(), _STATUS_S)
    if arguments.json:
        print_json(rows(status))
        return 0
    now_s = SystemClock().unix_s()
    print_table(
        ("MODEL", "UNIT", "STATE", "FOR", "LAST USED", "LEASES", "QUEUED", "KV MIB", "WORKERS MIB", "WEIGHTS", "WAKES"),
        (
            (
                row["model"],
                row["unit"],
                row["state"] + (", pinned" if row["pinned"] else ""),
                duration_text(max(0.0, now_s - row["state_since_unix_s"])),
                duration_text(max(0.0, now_s - row["last_used_unix_s"])),
                row["num_leases"],
                row["num_queued_requests"],
                f"{row['kv_bytes'] / _MIB:.1f}",
                f"{row['workers_bytes'] / _MIB:.0f}",
                row["weights"],
                row["num_wakes"] and f"{row['num_wakes']}, last {row['last_waking_s']:.2f} s",
            )
            for row in rows(status)
        ),
    )
    for unit in status.units:
        if not unit.connected:
            print(f"\nunit {unit.unit}: NOT CONNECTED")
    return 0


def rows(status: mesh_pb2.GetStatusResponse) -> list[dict[str, Any]]:
    """One row for each model of each unit, as `--json` prints them."""
    return [_row(unit, model) for unit in status.units for model in unit.models]


def _row(unit: mesh_pb2.UnitStatus, model: mesh_pb2.UnitModelStatus) -> dict[str, Any]:
    workers = [worker for worker in unit.workers if worker.model == model.model]
    num_blocks = model.num_leased_token_blocks + model.num_cached_token_blocks
    kept = {
        name: value
        for name, value in message_dict(model).items()
        if name in ("model", "state", "state_since_unix_s", "last_used_unix_s", "pinned", "num_leases",
                    "num_queued_requests", "num_wakes", "waking_s", "last_waking_s")
    }  # fmt: skip
    return {
        **kept,
        "unit": unit.unit,
        "kv_bytes": num_blocks * model.token_block_bytes,
        "workers_bytes": sum(worker.own_memory_bytes for worker in workers),
        "weights": _weights({worker.engine for worker in workers}),
    }


def _weights(engines: set[str]) -> str:
    """What the workers have of the weights, as one word: the most that one of them has."""
    if "awake" in engines:
        return "mapped"
    if engines <= {"dropped"}:
        return "dropped"
    return "changing" if "" in engines else "kept"


def _sleep(runtime: MeshRuntime, arguments: argparse.Namespace) -> int:
    request = admin_pb2.PutModelToSleepRequest(
        model=arguments.name, unit=arguments.unit, drop_weights=arguments.drop_weights
    )
    _call_router(runtime, admin_pb2_grpc.RouterAdminServiceStub, "PutModelToSleep", request, arguments.timeout)
    return _done(arguments, arguments.name, "sleeps", state="asleep")


def _wake(runtime: MeshRuntime, arguments: argparse.Namespace) -> int:
    request = admin_pb2.AwakenModelRequest(model=arguments.name, unit=arguments.unit)
    _call_router(runtime, admin_pb2_grpc.RouterAdminServiceStub, "AwakenModel", request, arguments.timeout)
    return _done(arguments, arguments.name, "is awake", state="awake")


def _load(runtime: MeshRuntime, arguments: argparse.Namespace) -> int:
    from muxmesh.models.prepared_model import packing_of, prepare_model  # noqa: PLC0415 - takes longer than the rest
    from muxmesh.supervisor.model_loading import checked_with_model, unit_of  # noqa: PLC0415 - as above

    _need_supervisor(runtime, "load", "start the workers of a new model", "add the model to mesh.yaml")
    model = model_of(arguments)
    unit, name = unit_of(runtime, arguments.unit), str(model["name"])
    config = checked_with_model(runtime, unit, model)
    bar = ProgressBar(name)
    prepare_model(config, packing_of(unit), current_dir(), runtime.cache_dir, bar)  # here, where the bar is seen
    request = admin_pb2.LoadModelRequest(unit=arguments.unit, model_json=_json(model))
    response = _call_supervisor(runtime, "LoadModel", request, arguments.timeout)
    return _done(arguments, name, f"is loaded on unit {response.unit}", unit=response.unit)


def model_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The model as in mesh.yaml. A source that is on this machine becomes an absolute path."""
    source = local_path(arguments.source, current_dir())
    name = arguments.name or Path(arguments.source).name.removesuffix(".gguf")
    model: dict[str, Any] = {"name": name, **dict(arguments.settings)}
    if os.path.lexists(source):
        model["source"] = str(source)
    elif model.get("engine") != "sim":
        model["source"] = arguments.source
    return model


def _unload(runtime: MeshRuntime, arguments: argparse.Namespace) -> int:
    _need_supervisor(runtime, "unload", "stop the workers of a model", "remove the model from mesh.yaml")
    _call_supervisor(runtime, "UnloadModel", admin_pb2.UnloadModelRequest(model=arguments.name), arguments.timeout)
    return _done(arguments, arguments.name, "is unloaded")


def _need_supervisor(runtime: MeshRuntime, command: str, what: str, instead: str) -> None:
    if not runtime.has_supervisor:
        raise ConfigError(
            f"model {command}: this mesh has no supervisor that could {what}: its services were started one by one, "
            f"with the runtime file of `muxmesh prepare`. Instead {instead}, run `muxmesh prepare` again and restart "
            "what it names. `muxmesh model sleep` and `wake` work without a supervisor"
        )


def _done(arguments: argparse.Namespace, model: str, text: str, **facts: str) -> int:
    """Prints that the command is done: ``text`` says what the model is or does now."""
    if arguments.json:
        print_json({"model": model, **facts})
    else:
        print(f"muxmesh: {model} {text}")
    return 0


def _json(model: dict[str, Any]) -> str:
    try:
        return json.dumps(model)
    except TypeError as error:
        raise InvalidRequest("set", f"has a value that is no JSON: {error}") from error


def _call_router(runtime: MeshRuntime, stub: Any, method: str, request: Any, timeout_s: float) -> Any:
    """Calls the routers of this machine until one does not fail with Unavailable. Raises Unavailable if all do."""
    supervisor = runtime.admin_address(SUPERVISOR)
    addresses = [f"unix:{path}" for path in sorted(runtime.run_dir.glob(f"*{ADMIN_SUFFIX}"))]
    routers = [address for address in addresses if address != supervisor]
    problem: Exception | None = None
    for address in routers:
        try:
            return asyncio.run(_call(address, stub, method, request, timeout_s))
        except Unavailable as error:  # the socket of a router that was killed
            problem = error
    if problem is None:
        raise Unavailable(f"no router of this mesh runs on this machine: none has a socket in {runtime.run_dir}")
    raise Unavailable(f"no router of this mesh on this machine could carry it out: {problem}")


def _call_supervisor(runtime: MeshRuntime, method: str, request: Any, timeout_s: float) -> Any:
    address = runtime.admin_address(SUPERVISOR)
    return asyncio.run(_call(address, admin_pb2_grpc.SupervisorAdminServiceStub, method, request, timeout_s))


async def _call(address: str, stub: Any, method: str, request: Any, timeout_s: float) -> Any:
    async with internal_channel(address) as channel:
        try:
            return await response_of(getattr(stub(channel), method)(request, timeout=timeout_s))
        except DeadlineExceeded as error:
            raise DeadlineExceeded(f"{method} was not done within {timeout_s:g} s; the mesh goes on with it") from error
