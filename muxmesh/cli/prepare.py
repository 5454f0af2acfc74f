"""`muxmesh prepare`: makes every check of `muxmesh up`, prepares the models and writes the runtime file.

Afterwards the services of the mesh can be started one by one, in any order, by whatever restarts them when they exit.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from muxmesh.cli.common import cache_dir, current_dir
from muxmesh.cli.operator_messages import OperatorMessages
from muxmesh.cli.preparation import MeshPart, MeshPreparation, PreparedMesh
from muxmesh.clock import SystemClock
from muxmesh.config.runtime import RUNTIME_FILE, MeshRuntime, MpsDaemons
from muxmesh.config.runtime_changes import restarts_needed
from muxmesh.config.schema import MeshConfig
from muxmesh.errors import ConfigError
from muxmesh.file_access import why_denied
from muxmesh.local_path import local_path
from muxmesh.machine_limits import machine_memory
from muxmesh.supervisor.redis_server import check_redis, with_redis_url
from muxmesh.supervisor.tenant_secret import SECRET_VARIABLE, given_tenant_secret, tenant_secret


def run(arguments: argparse.Namespace) -> int:
    """Prepares one mesh; returns the exit code. Raises ConfigError or Unavailable with what is wrong."""
    messages = OperatorMessages("prepare", SystemClock())
    return messages.run(lambda: _run(arguments, messages))


def _run(arguments: argparse.Namespace, messages: OperatorMessages) -> int:
    """The services have containers of their own, whose limits they check when they start."""
    preparation = MeshPreparation(
        arguments.config,
        messages,
        machine_memory(),
        shows_progress=not arguments.quiet,
        part=MeshPart(arguments.unit, arguments.router),
        published_at=arguments.published_at,
    )
    config = with_redis_url(preparation.config, arguments.redis_url)
    config.check_port_is_fixed()
    run_dir = local_path(str(arguments.run_dir), current_dir())
    path = run_dir / RUNTIME_FILE
    with _named(run_dir):
        _create(run_dir)
        if not os.access(run_dir, os.W_OK | os.X_OK, effective_ids=True):  # before models are downloaded
            raise ConfigError(why_denied(run_dir))
        before = _earlier_runtime(path, config)
    asyncio.run(check_redis(config.redis_url or ""))
    mesh = preparation.prepare()
    with _named(run_dir):
        runtime = _runtime(with_redis_url(mesh.config, arguments.redis_url), mesh, run_dir)
        runtime.check_socket_paths()
        runtime.write(path)
    messages.result(_summary(path, before, runtime))
    return 0


@contextlib.contextmanager
def _named(run_dir: Path) -> Iterator[None]:
    """Turns an OSError of the block, which uses the run folder, into a ConfigError."""
    try:
        yield
    except PermissionError as error:
        raise ConfigError(why_denied(Path(error.filename or run_dir))) from error
    except OSError as error:
        raise ConfigError(f"{run_dir}: cannot be written: {error.strerror}") from error


def _create(run_dir: Path) -> None:
    """Creates the folder, which only this user may enter. One that exists keeps its mode."""
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)


def _earlier_runtime(path: Path, config: MeshConfig) -> MeshRuntime | None:
    """The runtime file of this mesh that is there; None if there is none that this version can read.

    Raises ConfigError if it is that of another mesh.
    """
    if not path.exists():
        return None
    try:
        before = MeshRuntime.read(path)
    except ConfigError:  # of another version
        return None
    if before.config.mesh_id != config.mesh_id:
        raise ConfigError(
            f"{path} is of the mesh {before.config.mesh_id}, not of {config.mesh_id}; "
            "give each mesh a folder of its own, or delete this file"
        )
    return before


def _runtime(config: MeshConfig, mesh: PreparedMesh, run_dir: Path) -> MeshRuntime:
    assert config.redis_url is not None
    return MeshRuntime(
        config=config,
        run_dir=run_dir,
        cache_dir=cache_dir(),
        redis_url=config.redis_url,
        prepared=mesh.prepared,
        device_uuids=mesh.device_uuids,
        mps=mesh.mps_program and MpsDaemons(program=mesh.mps_program, log_dir=run_dir / "logs"),
        tenant_secret=given_tenant_secret(os.environ.get(SECRET_VARIABLE)) or tenant_secret(run_dir),
    )


def _summary(path: Path, before: MeshRuntime | None, runtime: MeshRuntime) -> str:
    if before is None:
        return f"muxmesh: prepared {path}"
    names = restarts_needed(before, runtime)
    return f"muxmesh: prepared {path}; " + (
        f"it has changed: restart {', '.join(names)}, if they run" if names else "nothing has changed"
    )
