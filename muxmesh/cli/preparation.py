"""What `muxmesh up` and `muxmesh prepare` share: every check of a mesh.yaml, and its models on this machine.

Starts no process and writes no runtime file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from muxmesh.cli.common import ProgressBar, cache_dir, source_dir
from muxmesh.cli.operator_messages import OperatorMessages
from muxmesh.clock import SystemClock
from muxmesh.config.contradictions import order_without_effect, tensor_parallel_problems
from muxmesh.config.listen_address import check_open_access, listen_warnings
from muxmesh.config.load import (
    Check,
    LoadedConfig,
    Problem,
    checked_config,
    default_config,
    load_mesh_config,
    with_listen,
)
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.runtime import PreparedModel
from muxmesh.config.schema import MeshConfig, UnitConfig
from muxmesh.cuda.device_list import DeviceList
from muxmesh.errors import ConfigError
from muxmesh.machine_limits import MemoryLimit
from muxmesh.models.gpu_check import (
    dtype_notice,
    gpu_software_problems,
    machine_gpu_problems,
    mps_notice,
    mps_program,
    unit_gpus,
    with_share_limits,
)
from muxmesh.models.prepared_model import (
    machine_problems,
    model_problems,
    packing_of,
    prepare_model,
    prepared_problems,
)
from muxmesh.quoting import quoted
from muxmesh.rpc.internal_tls import internal_certificate_problems
from muxmesh.rpc.server_certificates import certificate_problems
from muxmesh.supervisor.redis_server import redis_url_problems


@dataclass(frozen=True, slots=True)
class PreparedMesh:
    """What a runtime file needs beside its folders; see `MeshRuntime`.

    ``config``: that of the preparation, with what it leaves to the machine decided. ``mps_program``: None if no unit
    uses MPS.
    """

    config: MeshConfig
    prepared: dict[str, dict[str, PreparedModel]]
    device_uuids: dict[str, str]
    mps_program: Path | None


@dataclass(frozen=True, slots=True)
class MeshPart:
    """The processes of a mesh that run on this machine. Default: all of them, in one container if in any."""

    unit: str | None = None
    """Only those of this unit, each in a container of its own."""
    is_router: bool = False
    """Only routers, which need no weights and no device."""

    def units_of(self, config: MeshConfig) -> list[int]:
        """Indices of the units whose processes are here."""
        here = (not self.is_router and self.unit in (None, unit.name) for unit in config.units)
        return [index for index, is_here in enumerate(here) if is_here]

    def config_of(self, config: MeshConfig) -> MeshConfig:
        """``config`` with these units only, maybe none."""
        return config.model_copy(update={"units": tuple(config.units[index] for index in self.units_of(config))})

    def problems(self, config: MeshConfig, check: Check) -> Iterator[Problem]:
        """What ``check`` finds in these units, at its locations in ``config``."""
        indices = self.units_of(config)
        for location, problem in check(self.config_of(config)):
            if location[0] == "units" and len(location) > 1:
                yield ("units", indices[int(location[1])], *location[2:]), problem
            else:
                yield location, problem

    def with_share_limits(self, config: MeshConfig, gpus: DeviceList, program: Path | None) -> MeshConfig:
        """``config`` in which it is decided what limits the workers of these units, which are on this machine."""
        here = iter(with_share_limits(self.config_of(config), gpus, program).units)
        indices = self.units_of(config)
        units = tuple(next(here) if index in indices else unit for index, unit in enumerate(config.units))
        return config.model_copy(update={"units": units})

    @property
    def is_all(self) -> bool:
        return self == MeshPart()


class MeshPreparation:
    """A configuration that has passed every check that needs no downloaded model. Warnings are printed."""

    def __init__(
        self,
        file: Path | None,
        messages: OperatorMessages,
        limit: MemoryLimit,
        listen: str | None = None,
        shows_progress: bool = True,
        part: MeshPart = MeshPart(),
        published_at: str | None = None,
        config: MeshConfig | None = None,
    ) -> None:
        """``file``: mesh.yaml; None: ``config``, or else the default configuration. ``listen`` replaces that of the
        file.

        ``limit``: the memory for all processes of the mesh together. ``published_at``: see `listen_warnings`.
        ``messages`` get the format that the file names.
        Raises ConfigError with one line for each problem.
        """
        self._base_dir = source_dir(file)
        self._messages = messages
        self._limit = limit
        self._gpus = DeviceList()
        self._shows_progress = shows_progress
        self._part = part
        checks = (
            order_without_effect, self._tensor_parallel_problems, self._machine_problems, self._gpu_problems,
            redis_url_problems, self._model_problems, self._certificate_problems,
        )  # fmt: skip
        if file is not None:
            loaded = load_mesh_config(file, *checks, variables=os.environ)
        elif config is not None:
            loaded = checked_config(config, "(command line)", *checks)
        else:
            loaded = default_config(*checks)
        messages.use(loaded.config.log_format)
        loaded = replace(loaded, config=loaded.config.with_absolute_paths(self._base_dir))
        self._loaded: LoadedConfig = with_listen(loaded, listen) if listen else loaded
        if part.unit is not None and not part.units_of(self.config):
            names = ", ".join(unit.name for unit in self.config.units)
            raise ConfigError(f"no unit has the name {quoted(part.unit)}; units: {names}")
        check_open_access(self.config, published_at)
        for warning in listen_warnings(self.config, published_at):
            messages.notice(warning)

    @property
    def config(self) -> MeshConfig:
        return self._loaded.config

    def _tensor_parallel_problems(self, config: MeshConfig) -> Iterator[Problem]:
        return self._part.problems(config, tensor_parallel_problems)

    def prepare(self) -> PreparedMesh:
        """Downloads and converts the models, unless they are in the cache.

        Raises ConfigError for a problem of a downloaded model, or a cache that cannot be written.
        """
        config, here = self.config, self._part.config_of(self.config)
        prepared = {
            unit.name: {model.name: self._prepare(unit, model) for model in unit.models}
            for unit in (config if self._part.is_router else here).units
        }
        too_large = prepared_problems(config, prepared, self._limit) if self._part.is_all else ()
        self._loaded.refuse([*self._model_problems(config), *self._gpu_problems(config), *too_large])
        program = mps_program(here)
        config = self._part.with_share_limits(config, self._gpus, program)
        for notice in (dtype_notice(here), mps_notice(here, program)):
            if notice is not None:
                self._messages.notice(notice)
        return PreparedMesh(config, prepared, unit_gpus(here, self._gpus), program)

    def _machine_problems(self, config: MeshConfig) -> Iterator[Problem]:
        return self._part.problems(config, lambda here: machine_problems(here, self._limit))

    def _model_problems(self, config: MeshConfig) -> Iterator[Problem]:
        if self._part.is_router:
            return model_problems(config, self._base_dir, cache_dir(), with_weights=False)
        return self._part.problems(config, lambda here: model_problems(here, self._base_dir, cache_dir()))

    def _certificate_problems(self, config: MeshConfig) -> Iterator[Problem]:
        """Those of the public server, where there is one, and those between the hosts of the mesh."""
        if config.tls is not None and (self._part.is_all or self._part.is_router):
            tls = config.tls.absolute(self._base_dir)
            for field, problem in certificate_problems(tls, SystemClock().unix_s()):
                yield ("tls", field), problem
        if config.internal_tls is not None:
            internal = config.internal_tls.absolute(self._base_dir)
            for field, problem in internal_certificate_problems(internal, SystemClock().unix_s()):
                yield ("internal_tls", field), problem

    def _gpu_problems(self, config: MeshConfig) -> Iterator[Problem]:
        def check(here: MeshConfig) -> Iterator[Problem]:
            yield from gpu_software_problems(here, os.environ)
            yield from machine_gpu_problems(here, self._gpus, self._base_dir, cache_dir())

        return self._part.problems(config, check)

    def _prepare(self, unit: UnitConfig, model: ModelConfig) -> PreparedModel:
        messages = self._messages
        bar = ProgressBar(model.name, messages.progress if messages.are_json else None)
        progress = bar if self._shows_progress else _no_progress
        try:
            with_weights = not self._part.is_router
            return prepare_model(model, packing_of(unit), self._base_dir, cache_dir(), progress, with_weights)
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"{model.name} cannot be prepared in {cache_dir()}: {reason}") from error


def _no_progress(phase: str, done: int, total: int) -> None:
    pass
