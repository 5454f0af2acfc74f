"""What `muxmesh up` and `muxmesh prepare` share: every check of a mesh.yaml, and its models on this machine.

Starts no process and writes no runtime file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from muxmesh.cli.common import ProgressBar, cache_dir, source_dir
from muxmesh.config.contradictions import order_without_effect
from muxmesh.config.load import LoadedConfig, Problem, default_config, load_mesh_config, with_listen
from muxmesh.config.runtime import PreparedModel
from muxmesh.config.schema import MeshConfig, ModelConfig, UnitConfig
from muxmesh.cuda.device_list import DeviceList
from muxmesh.errors import ConfigError
from muxmesh.machine_limits import memory_limit
from muxmesh.models.gpu_check import (
    dtype_notice,
    gpu_software_problems,
    machine_gpu_problems,
    mps_notice,
    mps_program,
    unit_gpus,
)
from muxmesh.models.prepared_model import (
    machine_problems,
    model_problems,
    packing_of,
    prepare_model,
    prepared_problems,
)
from muxmesh.supervisor.listen_address import listen_warnings
from muxmesh.supervisor.redis_server import redis_url_problems


@dataclass(frozen=True, slots=True)
class PreparedMesh:
    """What a runtime file needs beside its folders; see `MeshRuntime`. ``mps_program``: None if no unit uses MPS."""

    prepared: dict[str, dict[str, PreparedModel]]
    device_uuids: dict[str, str]
    mps_program: Path | None


class MeshPreparation:
    """A configuration that has passed every check that needs no downloaded model. Warnings are printed."""

    def __init__(self, file: Path | None, listen: str | None = None, shows_progress: bool = True) -> None:
        """``file``: mesh.yaml; None: the default configuration. ``listen`` replaces that of the file.

        Raises ConfigError with one line for each problem.
        """
        self._base_dir = source_dir(file)
        self._gpus = DeviceList()
        self._shows_progress = shows_progress
        checks = (
            order_without_effect, self._machine_problems, self._gpu_problems, redis_url_problems, self._model_problems
        )  # fmt: skip
        loaded = load_mesh_config(file, *checks, variables=os.environ) if file else default_config(*checks)
        self._loaded: LoadedConfig = with_listen(loaded, listen) if listen else loaded
        for warning in listen_warnings(self.config):
            _notice(warning)

    @property
    def config(self) -> MeshConfig:
        return self._loaded.config

    def prepare(self) -> PreparedMesh:
        """Downloads and converts the models, unless they are in the cache.

        Raises ConfigError for a problem of a downloaded model, or a cache that cannot be written.
        """
        config = self.config
        prepared = {
            unit.name: {model.name: self._prepare(unit, model) for model in unit.models} for unit in config.units
        }
        too_large = prepared_problems(config, prepared, memory_limit())
        self._loaded.refuse([*self._model_problems(config), *self._gpu_problems(config), *too_large])
        program = mps_program(config)
        for notice in (dtype_notice(config), mps_notice(config, program)):
            if notice is not None:
                _notice(notice)
        return PreparedMesh(prepared, unit_gpus(config, self._gpus), program)

    @staticmethod
    def _machine_problems(config: MeshConfig) -> Iterator[Problem]:
        return machine_problems(config, memory_limit())

    def _model_problems(self, config: MeshConfig) -> Iterator[Problem]:
        return model_problems(config, self._base_dir, cache_dir())

    def _gpu_problems(self, config: MeshConfig) -> Iterator[Problem]:
        yield from gpu_software_problems(config, os.environ)
        yield from machine_gpu_problems(config, self._gpus, self._base_dir, cache_dir())

    def _prepare(self, unit: UnitConfig, model: ModelConfig) -> PreparedModel:
        progress = ProgressBar(model.name) if self._shows_progress else _no_progress
        try:
            return prepare_model(model, packing_of(unit), self._base_dir, cache_dir(), progress)
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"{model.name} cannot be prepared in {cache_dir()}: {reason}") from error


def _no_progress(phase: str, done: int, total: int) -> None:
    pass


def _notice(text: str) -> None:
    print(f"muxmesh: {text}", file=sys.stderr, flush=True)
