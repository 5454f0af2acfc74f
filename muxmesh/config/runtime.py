"""Where one running mesh lives: sockets, prepared models, Redis. Written by the supervisor, read by each service."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from muxmesh.config.schema import MeshConfig, ModelConfig, UnitConfig
from muxmesh.errors import ConfigError

MAX_SOCKET_PATH = 107


class Role(StrEnum):
    """The two phases of a request, each with its own workers."""

    PREFILL = "prefill"
    DECODE = "decode"


class PreparedModel(BaseModel):
    """A model that is on disk, ready to be mapped."""

    model_config = ConfigDict(frozen=True)

    folder: Path | None
    """Hugging Face style folder with config and tokenizer; None for a sim model without a source."""
    image: Path | None
    """Weight image that all workers map; None for the sim engine."""


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

    def model(self, name: str) -> tuple[UnitConfig, ModelConfig]:
        """The model called ``name`` and its unit; raises ConfigError."""
        models = self.config.models()
        if name not in models:
            raise ConfigError(f"no model is called {name!r}; there are: {', '.join(sorted(models))}")
        return models[name]

    def kvstore_address(self, unit: str) -> str:
        """GRPC address of a unit's kvstore."""
        return f"unix:{self.run_dir / f'kv-{unit}.sock'}"

    def attach_path(self, unit: str) -> Path:
        """Socket over which a unit's workers get the shared memory."""
        return self.run_dir / f"kv-{unit}.attach"

    def worker_address(self, role: Role, model: str) -> str:
        """GRPC address of one worker."""
        return f"unix:{self.run_dir / f'{role.value}-{model}.sock'}"

    def router_internal_address(self) -> str:
        """The router's health service for the supervisor, beside the public address."""
        return f"unix:{self.run_dir / 'router.sock'}"

    def check_socket_paths(self) -> None:
        """Raises ConfigError if a socket path is longer than the kernel takes."""
        addresses = [self.router_internal_address()]
        addresses += [self.worker_address(role, name) for name in self.config.models() for role in Role]
        addresses += [self.kvstore_address(unit.name) + "attach" for unit in self.config.units]
        for address in addresses:
            path = address.removeprefix("unix:")
            if len(path.encode()) > MAX_SOCKET_PATH:
                raise ConfigError(f"socket path is longer than {MAX_SOCKET_PATH} bytes: {path}; use a shorter name")

    def write(self, path: Path) -> None:
        """Writes it for the services to read."""
        path.write_text(self.model_dump_json(exclude_unset=True))

    @staticmethod
    def read(path: Path) -> MeshRuntime:
        """Reads what `write` wrote."""
        return MeshRuntime.model_validate_json(path.read_text())
