"""Where one running mesh lives: sockets, prepared models, Redis. Written by the supervisor, read by each service."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from muxmesh.config.schema import MeshConfig, ModelConfig, UnitConfig
from muxmesh.errors import ConfigError
from muxmesh.types import Role

MAX_SOCKET_PATH = 107


class PreparedModel(BaseModel):
    """A model that is on disk, ready to be mapped."""

    model_config = ConfigDict(frozen=True)

    folder: Path | None
    """Hugging Face style folder with config and tokenizer; None for a sim model without a source."""
    image: Path | None
    """Weight image that all workers map; None for the sim engine."""
    weights_fingerprint: str
    """Differs between models with different weights; part of the identity of their KV."""


@dataclass(frozen=True, slots=True)
class ProcessKey:
    """Which process of the mesh: a router, the kvstore of a unit, or a replica of a worker of one of its models."""

    role: Literal["router", "kvstore"] | Role
    unit: str = ""
    model: str = ""
    replica: int = 0

    @property
    def name(self) -> str:
        """Unique name of the process in the mesh."""
        parts = [part for part in (str(self.role), self.unit, self.model) if part]
        return "/".join(parts) + (f"#{self.replica}" if self.replica else "")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A process of the mesh as people see it, and the address of its gRPC services inside the mesh."""

    name: str
    address: str


class MeshRuntime(BaseModel):
    """The configuration together with what the supervisor resolved."""

    model_config = ConfigDict(frozen=True)

    config: MeshConfig
    """What the operator wrote."""
    run_dir: Path
    """Sockets, mode 0700: who may enter is the mesh."""
    cache_dir: Path
    """Models and compiled kernels."""
    redis_url: str
    """Where the registry is."""
    prepared: dict[str, PreparedModel]
    """Model name → what is on disk."""

    def unit(self, name: str) -> UnitConfig:
        """The unit called ``name``; raises ConfigError."""
        for unit in self.config.units:
            if unit.name == name:
                return unit
        raise ConfigError(f"no unit is called {name!r}; there are: {', '.join(u.name for u in self.config.units)}")

    def model(self, unit: str, name: str) -> tuple[UnitConfig, ModelConfig]:
        """A unit and its model called ``name``; raises ConfigError."""
        found = self.unit(unit)
        for model in found.models:
            if model.name == name:
                return found, model
        served = ", ".join(sorted(model.name for model in found.models))
        raise ConfigError(f"unit {unit} has no model {name!r}; it has: {served}")

    def endpoints(self) -> dict[ProcessKey, Endpoint]:
        """Every process of this mesh, in the order in which a unit's workers are numbered; routers last."""
        return {key: Endpoint(self._display_name(key), self._address(key)) for key in self._process_keys()}

    def attach_path(self, unit: str) -> Path:
        """Socket over which a unit's workers get the shared memory."""
        return self.run_dir / f"kv-{unit}.attach"

    def check_socket_paths(self) -> None:
        """Raises ConfigError if a socket path is longer than the kernel takes, or two processes would share one."""
        taken: dict[str, str] = {}
        for endpoint in self.endpoints().values():
            path = endpoint.address.removeprefix("unix:")
            if path in taken:
                raise ConfigError(f"{endpoint.name} and {taken[path]} would share the socket {path}; rename one")
            taken[path] = endpoint.name
        for path in [*taken, *(str(self.attach_path(unit.name)) for unit in self.config.units)]:
            if len(path.encode()) > MAX_SOCKET_PATH:
                raise ConfigError(f"socket path is longer than {MAX_SOCKET_PATH} bytes: {path}; use a shorter name")

    def write(self, path: Path) -> None:
        """Writes the file that services read."""
        path.write_text(self.model_dump_json(exclude_unset=True))

    @staticmethod
    def read(path: Path) -> MeshRuntime:
        """Reads what `write` wrote."""
        return MeshRuntime.model_validate_json(path.read_text())

    def _process_keys(self) -> Iterator[ProcessKey]:
        for unit in self.config.units:
            yield ProcessKey("kvstore", unit.name)
            for model in unit.models:
                for role in Role:
                    yield ProcessKey(role, unit.name, model.name)
        yield ProcessKey("router")

    def _display_name(self, key: ProcessKey) -> str:
        """The key's name, without the unit where the model is served by one unit only."""
        if key.model and len(self.config.units_of(key.model)) == 1:
            return ProcessKey(key.role, "", key.model, key.replica).name
        return key.name

    def _address(self, key: ProcessKey) -> str:
        return f"unix:{self.run_dir / self._display_name(key).replace('/', '-')}.sock"
