"""The runtime file of one mesh: configuration, socket paths, prepared models, Redis.

The supervisor or `muxmesh prepare` writes it, services read it.

Knows the processes of a mesh and their addresses. Starts nothing and opens no connection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import MeshConfig, UnitConfig
from muxmesh.config.section import NAME_PATTERN
from muxmesh.cuda.mps import LOG_DIRECTORY, PIPE_DIRECTORY, SHARE, MpsControl
from muxmesh.errors import ConfigError
from muxmesh.file_access import why_denied
from muxmesh.file_replacement import replace_file
from muxmesh.process_files import process_file
from muxmesh.quoting import quoted
from muxmesh.types import Role

RUNTIME_FILE = "runtime.json"
"""Name of the runtime file in the run folder."""
ADMIN_SUFFIX = ".ctrl"
"""Ends the paths of the sockets for commands of an operator."""
SUPERVISOR = "supervisor"
"""Name of the supervisor among them. It is no process of the runtime file."""
MAX_SOCKET_PATH = 107
"""Bytes that ``sockaddr_un.sun_path`` holds on Linux, without the final zero."""


class PreparedModel(BaseModel):
    """The files of a model, ready to be mapped."""

    model_config = ConfigDict(frozen=True)

    folder: Path | None
    """Folder in Hugging Face format with config and tokenizer. None for a sim model without a source."""
    image: Path | None
    """Weight image that all workers of a unit share, packed for the unit's device. None for the sim engine,
    and in the runtime file of a router that was prepared without weights."""
    weights_fingerprint: str
    """Differs between models with different weights or data types. Part of the identity of their KV.
    Empty where there are no weights: routers learn it from the units."""


class MpsDaemons(BaseModel):
    """The MPS daemons of this mesh, one for each GPU with a unit that uses MPS."""

    model_config = ConfigDict(frozen=True)

    program: Path
    """The control program, nvidia-cuda-mps-control."""
    log_dir: Path
    """Folder with a log directory for each daemon."""


@dataclass(frozen=True, slots=True)
class ProcessKey:
    """Identifies a process of the mesh: a router, the kvstore of a unit, or a replica of a worker.

    Routers have neither unit nor model; a kvstore has no model.
    """

    role: Literal["router", "kvstore"] | Role
    unit: str = ""
    model: str = ""
    replica: int = 0

    @property
    def name(self) -> str:
        """Name of the process, unique in the mesh: ``role/unit/model#replica`` without empty parts.

        Routers are ``router``, ``router-2``, ``router-3``, ...
        """
        if self.role == "router":
            return f"router-{self.replica + 1}" if self.replica else "router"
        parts = [part for part in (str(self.role), self.unit, self.model) if part]
        return "/".join(parts) + (f"#{self.replica}" if self.replica else "")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Display name of a process, and the addresses at which others call it."""

    name: str
    address: str
    """Its unix socket: for processes with the same run folder."""
    remote_address: str
    """For routers, which may be on other hosts: HOST:PORT if its unit has `network`, else `address`."""
    listen: tuple[str, ...]
    """All addresses on which it listens, except the public one of a router."""

    @property
    def is_on_network(self) -> bool:
        """Whether processes of other hosts call it."""
        return self.remote_address != self.address


class MeshRuntime(BaseModel):
    """The configuration, and the paths and prepared models that the supervisor or `muxmesh prepare` resolved."""

    model_config = ConfigDict(frozen=True)

    config: MeshConfig
    """The content of mesh.yaml."""
    run_dir: Path
    """Folder of all sockets. Its mode is 0700, so only the user who runs the mesh can connect."""
    cache_dir: Path
    """Folder of downloaded models and compiled kernels."""
    redis_url: str
    """URL of the Redis with the process registry."""
    prepared: dict[str, dict[str, PreparedModel]]
    """The files of each model of each unit, by unit name and model name."""
    device_uuids: dict[str, str] = {}
    """UUID of the GPU of each unit on one, by unit name. In the processes of the unit CUDA_VISIBLE_DEVICES holds it, so
    their device has index 0."""
    mps: MpsDaemons | None = None
    """None: this machine has no MPS, or no unit is to use it."""
    has_supervisor: bool = False
    """Whether `muxmesh up` has written the file: it starts the processes that the file names and counts their
    restarts."""
    tenant_secret: str = Field(default="", repr=False)
    """Key of the hashes under which the length predictor knows tenants, in hexadecimal. Empty: a router makes its own,
    and what it learned of tenants ends with it."""

    @property
    def path(self) -> Path:
        """Where the runtime file is."""
        return self.run_dir / RUNTIME_FILE

    def counts_own_restarts(self, process: str) -> bool:
        """Whether the process of this display name counts its restarts itself, since no supervisor starts it."""
        return not (self.has_supervisor and process in {endpoint.name for endpoint in self.endpoints().values()})

    def unit(self, name: str) -> UnitConfig:
        """The unit of this name. Raises ConfigError if there is none."""
        for unit in self.config.units:
            if unit.name == name:
                return unit
        raise ConfigError(f"no unit has the name {quoted(name)}; units: {', '.join(u.name for u in self.config.units)}")

    def model(self, unit: str, name: str) -> tuple[UnitConfig, ModelConfig]:
        """The unit ``unit`` and its model ``name``. Raises ConfigError if either does not exist."""
        found = self.unit(unit)
        for model in found.models:
            if model.name == name:
                return found, model
        served = ", ".join(sorted(model.name for model in found.models))
        raise ConfigError(f"unit {unit} has no model {quoted(name)}; models: {served}")

    def prepared_model(self, unit: str, model: str) -> PreparedModel:
        """The files of ``model`` for the device of ``unit``, both of which the mesh has."""
        return self.prepared[unit][model]

    def with_listen(self, listen: str) -> MeshRuntime:
        """The same with another address of the public API. Raises ConfigError if ``listen`` is not HOST:PORT."""
        return self.model_copy(update={"config": self.config.with_listen(listen)})

    def endpoints(self) -> dict[ProcessKey, Endpoint]:
        """All processes of this mesh in a fixed order: by unit, kvstore before workers; the routers last."""
        endpoints = {key: endpoint for unit in self.config.units for key, endpoint in self._unit_endpoints(unit)}
        return {**endpoints, **{key: self._router_endpoint(key.name) for key in self.router_keys()}}

    def router_keys(self) -> list[ProcessKey]:
        """The routers that a supervisor starts."""
        return [ProcessKey("router", replica=index) for index in range(self.config.routers)]

    def display_name(self, key: ProcessKey) -> str:
        """The name of a process in logs, status and registry: without the unit if only one unit serves the model."""
        if key.model and len(self.config.units_of(key.model)) == 1:
            return ProcessKey(key.role, "", key.model, key.replica).name
        return key.name

    def router_endpoint(self, name: str) -> Endpoint:
        """The endpoint of the router ``name``: `router_keys` under a supervisor, any other name without one.

        Raises ConfigError if the name is not one, or its socket is that of another process, or has too long a path.
        """
        if not re.fullmatch(NAME_PATTERN, name):
            raise ConfigError(f"the name of a router is {quoted(name)}; needed are letters, digits, `.`, `_` and `-`")
        if name == SUPERVISOR:
            raise ConfigError(
                f"a router with the name {name} would have the control socket of the supervisor; rename it"
            )
        endpoint = self._router_endpoint(name)
        for key, other in self.endpoints().items():
            if endpoint.address == other.address and key.role != "router":
                raise ConfigError(f"a router with the name {name} would have the socket of {other.name}; rename it")
        _check_length(endpoint.address.removeprefix("unix:"), "a shorter name of the router (--name)")
        return endpoint

    def metrics_address(self, name: str) -> str:
        """Address of the HTTP endpoint that a supervisor gives a process by display name: a unix socket."""
        return self._socket(name, ".http")

    def admin_address(self, name: str) -> str:
        """Address at which a router, or the supervisor, takes the commands of an operator: a unix socket."""
        return self._socket(name, ADMIN_SUFFIX)

    def attach_path(self, unit: str) -> Path:
        """Socket over which a kvstore passes the shared memory to the workers of its unit."""
        return self.run_dir / f"kv-{unit}.attach"

    def uses_mps(self, unit: str) -> bool:
        """Whether the workers of a unit are clients of an MPS daemon.

        Raises ConfigError if they have to be, and the control program is not known.
        """
        config = self.unit(unit)
        if not config.is_cuda or config.mps == "off":
            return False
        if config.mps == "on" and self.mps is None:
            raise ConfigError(f"unit {unit} has mps: on, but the runtime file names no control program of MPS")
        return self.mps is not None

    def mps_directories(self, unit: str) -> dict[str, str]:
        """The pipe and log directory of the daemon of the unit's GPU, as environment variables. The unit uses MPS."""
        assert self.mps is not None
        name = f"mps-{self.device_uuids[unit].removeprefix('GPU-')[:8]}"
        return {PIPE_DIRECTORY: str(self.run_dir / name), LOG_DIRECTORY: str(self.mps.log_dir / name)}

    def mps_control(self, unit: str) -> MpsControl:
        """The control program for the daemon of the unit's GPU. Raises ConfigError if the unit does not use MPS."""
        if self.mps is None or not self.uses_mps(unit):
            raise ConfigError(f"unit {unit} does not use MPS: its device is {self.unit(unit).device}")
        directories = self.mps_directories(unit)
        return MpsControl(self.mps.program, Path(directories[PIPE_DIRECTORY]), Path(directories[LOG_DIRECTORY]))

    def environment(self, key: ProcessKey) -> dict[str, str]:
        """The variables that a process needs beside those of the supervisor: on a GPU, its device and its share.

        kvstore is outside MPS, and so are the workers of a unit that does not use it, even if the machine has a daemon.
        """
        if key.role == "router" or not self.unit(key.unit).is_cuda:
            return {}
        visible = {"CUDA_VISIBLE_DEVICES": self.device_uuids[key.unit]}
        if key.role == "kvstore" or not self.uses_mps(key.unit):
            return {**visible, PIPE_DIRECTORY: str(self.run_dir / "outside-mps")}
        return {**visible, **self.mps_directories(key.unit), SHARE: str(self.share_of(key))}

    def share_of(self, key: ProcessKey) -> int:
        """Percentage of its GPU to which MPS limits a worker; 100 if green contexts limit it."""
        unit, model = self.model(key.unit, key.model)
        return 100 if unit.limits_by_green_contexts else model.compute_share.of(Role(key.role))

    def set_environment(self, key: ProcessKey, environment: MutableMapping[str, str], has_supervisor: bool) -> None:
        """Sets the variables that a process needs, or calls `check_environment` if a supervisor has set them."""
        if has_supervisor:
            self.check_environment(key, environment)
        else:
            environment.update(self.environment(key))

    def check_environment(self, key: ProcessKey, environment: Mapping[str, str]) -> None:
        """Raises ConfigError unless a process has the variables that the supervisor sets.

        A worker that misses one could compute on another GPU, or without a limit.
        """
        for name, value in self.environment(key).items():
            if environment.get(name) != value:
                found = f"is {quoted(environment[name])}" if name in environment else "is not set"
                raise ConfigError(f"{self.display_name(key)}: {name} {found}; must be {value}")

    def check_socket_paths(self) -> None:
        """Raises ConfigError if a socket path exceeds `MAX_SOCKET_PATH`, or if two processes have the same one."""
        names: dict[str, str] = {}
        for endpoint in self.endpoints().values():
            path = endpoint.address.removeprefix("unix:")
            if path in names:
                raise ConfigError(
                    f"{names[path]} and {endpoint.name} have the same socket {path}; rename a unit or a model"
                )
            names[path] = endpoint.name
        here = (unit.name for unit in self.config.units if unit.name in self.device_uuids)
        mps = [name for name in here if self.uses_mps(name)]
        others = [
            *(str(self.attach_path(unit.name)) for unit in self.config.units),
            *(f"{self.mps_directories(unit)[PIPE_DIRECTORY]}/control_privileged" for unit in mps),
        ]
        for path in [*names, *others]:
            _check_length(path, "shorter names")

    def write(self, path: Path) -> None:
        """Writes the runtime file as JSON, which only this user can read: it has secrets. Raises OSError."""
        replace_file(path, self.model_dump_json(exclude_unset=True))

    @staticmethod
    def read(path: Path) -> MeshRuntime:
        """Reads a runtime file that `write` wrote. Raises ConfigError if it cannot be read, or is none."""
        try:
            return MeshRuntime.model_validate_json(path.read_bytes())
        except OSError as error:
            if isinstance(error, PermissionError):
                raise ConfigError(why_denied(path)) from error
            hint = "; `muxmesh prepare` writes it" if isinstance(error, FileNotFoundError) else ""
            raise ConfigError(f"{path}: the runtime file cannot be read: {error.strerror}{hint}") from error
        except ValidationError as error:
            raise ConfigError(
                f"{path}: is no runtime file of this version of MuxMesh; write it again with `muxmesh prepare`"
            ) from error

    def _unit_endpoints(self, unit: UnitConfig) -> Iterator[tuple[ProcessKey, Endpoint]]:
        workers = (ProcessKey(role, unit.name, model.name) for model in unit.models for role in Role)
        for index, key in enumerate((ProcessKey("kvstore", unit.name), *workers)):
            name, network = self.display_name(key), unit.network
            socket = self._socket(name)
            if network is None:
                yield key, Endpoint(name, socket, socket, (socket,))
            else:
                remote, listen = (f"{host}:{unit.ports[index]}" for host in (network.url_host, network.listen_host))
                yield key, Endpoint(name, socket, remote, (socket, listen))

    def _router_endpoint(self, name: str) -> Endpoint:
        socket = self._socket(name)
        return Endpoint(name, socket, socket, (socket,))

    def _socket(self, name: str, suffix: str = ".sock") -> str:
        """``suffix``: as long as the default, with which `check_socket_paths` measures the paths."""
        return f"unix:{self.run_dir / process_file(name, suffix)}"


def _check_length(socket_path: str, hint: str) -> None:
    if len(socket_path.encode()) > MAX_SOCKET_PATH:
        raise ConfigError(f"socket path is longer than {MAX_SOCKET_PATH} bytes: {socket_path}; use {hint}")
