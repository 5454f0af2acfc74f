"""What is refused before anything of a running mesh changes, and what is undone when a step fails.

With every process real: tests/mesh/test_living_unit.py.
"""

import asyncio
import functools
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from muxmesh.config.runtime import MeshRuntime, PreparedModel, ProcessKey
from muxmesh.config.schema import MeshConfig
from muxmesh.errors import ConfigError, InvalidRequest, MeshError, Unavailable
from muxmesh.internal.v1 import admin_pb2, admin_pb2_grpc, kvstore_pb2, kvstore_pb2_grpc
from muxmesh.rpc.server import MeshServer
from muxmesh.supervisor.model_loading import ModelLoading, checked_with_model, unit_of

SIM = {"engine": "sim"}


class Mesh(kvstore_pb2_grpc.UnitModelServiceServicer, admin_pb2_grpc.RouterAdminServiceServicer):
    """Stands in for the supervisor, its unit `u` and its router. Notes what they are told; a step can fail."""

    def __init__(self, runtime: MeshRuntime, failures: dict[str, MeshError]) -> None:
        self.runtime = runtime
        self.failures = failures
        self.steps: list[str] = []
        self.starts_for_ever = False
        self.is_starting = asyncio.Event()
        runtime.write(runtime.path)

    def _step(self, name: str) -> None:
        self.steps.append(name)
        if name in self.failures:
            raise self.failures[name]

    @property
    def written(self) -> list[str]:
        return list(MeshRuntime.read(self.runtime.path).config.models())

    def set_runtime(self, runtime: MeshRuntime) -> None:
        runtime.write(runtime.path)
        self.runtime = runtime

    async def start_workers(self, unit: str, model: str) -> None:
        self._step("start")
        self.is_starting.set()
        if self.starts_for_ever:
            await asyncio.Event().wait()

    async def stop_processes(self, names: Iterable[str]) -> None:
        self._step(f"stop {' '.join(names)}")

    async def AddModel(self, request: Any, context: Any) -> kvstore_pb2.AddModelResponse:
        self._step(f"add {request.model}")
        return kvstore_pb2.AddModelResponse()

    async def RemoveModel(self, request: Any, context: Any) -> kvstore_pb2.RemoveModelResponse:
        self._step(f"remove {request.model}")
        return kvstore_pb2.RemoveModelResponse()

    async def ReadRuntime(self, request: Any, context: Any) -> admin_pb2.ReadRuntimeResponse:
        self._step(f"router serves {' '.join(self.written)}")
        return admin_pb2.ReadRuntimeResponse()


def new_mesh(runtime: MeshRuntime, failures: dict[str, MeshError]) -> Mesh:
    made: Mesh = cast(Any, Mesh)(runtime, failures)  # it serves no other call of the two services
    return made


@asynccontextmanager
async def mesh(folder: Path, *models: str, **failures: MeshError) -> AsyncIterator[tuple[Mesh, ModelLoading]]:
    """A mesh with one unit. ``failures``: step, with `_` for a space, → error."""
    runtime = runtime_of(folder, unit("u", *models))
    served = new_mesh(runtime, {step.replace("_", " "): error for step, error in failures.items()})
    services: Any = {
        kvstore_pb2.DESCRIPTOR.services_by_name["UnitModelService"]: functools.partial(
            kvstore_pb2_grpc.add_UnitModelServiceServicer_to_server, served
        ),
        admin_pb2.DESCRIPTOR.services_by_name["RouterAdminService"]: functools.partial(
            admin_pb2_grpc.add_RouterAdminServiceServicer_to_server, served
        ),
    }
    server = MeshServer(services)
    await server.start([runtime.endpoints()[ProcessKey("kvstore", "u")].address, runtime.admin_address("router")])
    try:
        yield served, ModelLoading(cast(Any, served))
    finally:
        await server.stop(0)


@pytest.fixture
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path that is short enough for sockets."""
    return tmp_path_factory.mktemp("s")


def runtime_of(folder: Path, *units: dict[str, Any]) -> MeshRuntime:
    config = MeshConfig.model_validate({"units": units})
    prepared = PreparedModel(folder=None, image=None, weights_fingerprint="w")
    return MeshRuntime(
        config=config,
        run_dir=folder,
        cache_dir=folder,
        redis_url="unix:///nowhere",
        prepared={unit.name: {model.name: prepared for model in unit.models} for unit in config.units},
    )


def unit(name: str, *models: str, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "models": [{"name": model, **SIM} for model in models],
        "kv_pool": "4MiB",
        "slab": "1MiB",
        **fields,
    }


@pytest.mark.parametrize(
    ("model", "error", "reason"),
    [
        ({"name": "b", **SIM}, InvalidRequest, "is the name of another model of this mesh"),
        ({"name": "x y", **SIM}, ConfigError, r"units\[0\].models\[1\].name"),
        ({"name": "c", **SIM, "kv_guaranteed": "1GiB"}, ConfigError, "kv_guaranteed of the models needs"),
        ({"name": "c", **SIM, "max_num_sequences": 1}, ConfigError, "max_num_sequences"),
        ({"name": "c", "source": "/no/model"}, ConfigError, "neither a folder"),
        ({"name": "c", **SIM, "pinned": True}, ConfigError, "max_awake_models"),
        ({}, ConfigError, "name"),
    ],
)
def test_a_model_is_checked_as_in_a_mesh_yaml(
    tmp_path: Path, model: dict[str, Any], error: type[Exception], reason: str
) -> None:
    runtime = runtime_of(tmp_path, unit("u", "a", cores=[0], max_awake_models=1), unit("v", "b", cores=[1]))
    with pytest.raises(error, match=reason):
        checked_with_model(runtime, runtime.unit("u"), model)
    assert checked_with_model(runtime, runtime.unit("u"), {"name": "c", **SIM}).name == "c"


def test_a_unit_on_a_gpu_gets_no_model_while_it_runs(tmp_path: Path) -> None:
    runtime = runtime_of(tmp_path, {"name": "g", "device": "cuda:0", "models": [{"name": "a"}]})
    with pytest.raises(InvalidRequest, match="g is on a GPU, whose memory is divided when the unit starts"):
        checked_with_model(runtime, runtime.unit("g"), {"name": "b", **SIM})


@pytest.mark.parametrize(
    ("unit", "reason"),
    [
        ({"name": "u", "models": [{"name": "a", **SIM}]}, "'a' is the last model of unit u"),
        ({"name": "g", "device": "cuda:0", "models": [{"name": "a"}, {"name": "b"}]}, "'a' is on unit g, a GPU"),
    ],
)
async def test_a_model_that_cannot_be_unloaded_stays(tmp_path: Path, unit: dict[str, Any], reason: str) -> None:
    served = new_mesh(runtime_of(tmp_path, unit), {})
    with pytest.raises(InvalidRequest, match=reason):
        await ModelLoading(cast(Any, served)).unload("a")
    assert "a" in served.written and not served.steps


def test_the_unit_is_named_if_there_are_several(tmp_path: Path) -> None:
    one = runtime_of(tmp_path, unit("u", "a"))
    assert unit_of(one, "").name == unit_of(one, "u").name == "u"
    several = runtime_of(tmp_path, unit("u", "a", cores=[0]), unit("v", "b", cores=[1]))
    with pytest.raises(InvalidRequest, match="is needed, because the mesh has several; one of: u, v"):
        unit_of(several, "")
    with pytest.raises(ConfigError, match="no unit has the name 'w'"):
        unit_of(several, "w")


def test_models_that_run_already_are_not_looked_for_again(tmp_path: Path) -> None:
    """Their sources are relative to a mesh.yaml that may be gone."""
    runtime = runtime_of(tmp_path, {"name": "u", "models": [{"name": "a", "source": "models/a"}]})
    assert checked_with_model(runtime, runtime.unit("u"), {"name": "b", **SIM}).name == "b"


def test_a_mesh_without_mesh_yaml_gets_a_model(tmp_path: Path) -> None:
    runtime = runtime_of(tmp_path, unit("u", "a")).model_copy(update={"config": MeshConfig()})
    assert checked_with_model(runtime, unit_of(runtime, ""), {"name": "b", **SIM}).name == "b"


async def test_a_model_is_loaded_and_unloaded_in_steps(run_dir: Path) -> None:
    async with mesh(run_dir, "a") as (served, loading):
        assert await loading.load("", {"name": "b", **SIM}) == "u"
        assert served.steps == ["add b", "start", "router serves a b"]
        served.steps.clear()
        await loading.unload("b")
        assert served.steps == ["router serves a", "remove b", "stop prefill/b decode/b"]
        assert served.written == ["a"]


@pytest.mark.parametrize(
    ("failed", "undone"),
    [
        ("add_b", ["router serves a"]),
        ("start", ["remove b", "router serves a"]),
        ("router_serves_a_b", ["stop prefill/b decode/b", "remove b", "router serves a"]),
    ],
)
async def test_after_a_step_that_fails_the_earlier_ones_are_undone(
    run_dir: Path, failed: str, undone: list[str]
) -> None:
    async with mesh(run_dir, "a", **{failed: Unavailable("no luck")}) as (served, loading):
        with pytest.raises(Unavailable, match="no luck"):
            await loading.load("u", {"name": "b", **SIM})
        assert served.steps[served.steps.index(failed.replace("_", " ")) + 1 :] == undone
        assert served.written == list(served.runtime.config.models()) == ["a"]


async def test_the_workers_of_an_unloaded_model_stop_even_if_kvstore_dies_meanwhile(run_dir: Path) -> None:
    async with mesh(run_dir, "a", "b", remove_b=Unavailable("connection reset")) as (served, loading):
        await loading.unload("b")
        assert served.steps[-1] == "stop prefill/b decode/b"


async def test_a_load_that_ends_with_the_mesh_undoes_nothing(run_dir: Path) -> None:
    async with mesh(run_dir, "a") as (served, loading):
        served.starts_for_ever = True
        task = asyncio.create_task(loading.load("u", {"name": "b", **SIM}))
        await served.is_starting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert served.steps == ["add b", "start"]
