"""`muxmesh health`: asks one service whether it serves. Imports little, since probes run it all the time."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxmesh.addresses import check_address
from muxmesh.cli.tls_options import given_tls_option, tls_of
from muxmesh.errors import ConfigError, TlsFailed, Unavailable
from muxmesh.process_files import process_file

if TYPE_CHECKING:
    from muxmesh.client.tls import TlsCredentials

_OPTIONS = (("grpc.enable_http_proxy", 0),)


def run(arguments: argparse.Namespace) -> int:
    """Prints SERVING and returns 0.

    Raises Unavailable if the service does not serve, TlsFailed, InvalidRequest or ConfigError.
    """
    if arguments.runtime is None:
        address = check_address(arguments.service)
    else:
        if (option := given_tls_option(arguments)) is not None:
            raise ConfigError(f"{option}: has no effect with --runtime: its unix sockets have no TLS")
        address = _address_of(arguments.service, arguments.runtime)
    tls = _credentials(arguments, address)
    with _channel(address, tls) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            response = stub.Check(health_pb2.HealthCheckRequest(), timeout=arguments.timeout)
        except grpc.RpcError as error:
            raise _unavailable(arguments.service, error, arguments.timeout, tls) from error
    status: str = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
    if response.status != health_pb2.HealthCheckResponse.SERVING:
        raise Unavailable(f"{arguments.service}: {status}")
    print(status)
    return 0


def _credentials(arguments: argparse.Namespace, address: str) -> TlsCredentials | None:
    if (tls := tls_of(arguments, address)) is False:
        return None
    from muxmesh.client.tls import read_credentials  # noqa: PLC0415 - takes longer than all of the rest

    return read_credentials(tls)


def _channel(address: str, tls: TlsCredentials | None) -> grpc.Channel:
    if tls is None:
        return grpc.insecure_channel(address, options=_OPTIONS)
    return grpc.secure_channel(address, tls.credentials, options=(*_OPTIONS, *tls.options))


def _unavailable(service: str, error: grpc.RpcError, timeout_s: float, tls: TlsCredentials | None) -> Unavailable:
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Unavailable(f"{service}: no response within {timeout_s:g} s")
    if error.code() is not grpc.StatusCode.UNAVAILABLE:
        return Unavailable(f"{service}: {error.code().name}: {error.details()}")
    from muxmesh.client.tls_errors import closed_hint, tls_problem  # noqa: PLC0415 - as above

    details = str(error.details())
    if (problem := tls_problem(details)) is not None:
        return TlsFailed(f"{service}: {problem}")
    hint = closed_hint(details, tls)
    return Unavailable(f"{service}: {details.rpartition(': ')[2]}" + ("" if hint is None else f"; {hint}"))


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
