"""`muxmesh health`: asks one service whether it serves. Imports little, since probes run it all the time."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxmesh.addresses import check_address
from muxmesh.errors import ConfigError, Unavailable
from muxmesh.process_files import process_file

_OPTIONS = (("grpc.enable_http_proxy", 0),)


def run(arguments: argparse.Namespace) -> int:
    """Prints SERVING and returns 0. Raises Unavailable if the service does not serve, InvalidRequest or ConfigError."""
    if arguments.runtime is None:
        address = check_address(arguments.service)
    else:
        address = _address_of(arguments.service, arguments.runtime)
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            response = stub.Check(health_pb2.HealthCheckRequest(), timeout=arguments.timeout)
        except grpc.RpcError as error:
            raise Unavailable(f"{arguments.service}: {_problem(error, arguments.timeout)}") from error
    status: str = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
    if response.status != health_pb2.HealthCheckResponse.SERVING:
        raise Unavailable(f"{arguments.service}: {status}")
    print(status)
    return 0


def _problem(error: grpc.RpcError, timeout_s: float) -> str:
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no response within {timeout_s:g} s"
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return str(error.details()).rpartition(": ")[2]  # gRPC lists all addresses before
    return f"{error.code().name}: {error.details()}"


def _address_of(name: str, runtime_file: Path) -> str:
    """The address of the process ``name`` of a mesh. Raises ConfigError, with the names of its processes."""
    try:
        run_dir = Path(json.loads(runtime_file.read_bytes())["run_dir"])
        socket = run_dir / process_file(name, ".sock")
        if socket.exists():  # so that the schema of the whole file need not be loaded
            return f"unix:{socket}"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    from muxmesh.config.runtime import MeshRuntime  # noqa: PLC0415 - takes longer than all of the rest

    names = [endpoint.name for endpoint in MeshRuntime.read(runtime_file).endpoints().values()]
    if name in names:
        raise Unavailable(f"{name}: is not running: there is no {socket}")
    raise ConfigError(f"no process has the name {name}; there are {', '.join(names)}")
