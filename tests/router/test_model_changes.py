"""Models that come and go in the runtime file, against what a router then serves."""

from pathlib import Path

import pytest

from muxmesh.clock import ManualClock
from muxmesh.config.runtime import MeshRuntime, PreparedModel
from muxmesh.config.schema import MeshConfig
from muxmesh.errors import ConfigError
from muxmesh.internal.v1 import kvstore_pb2_grpc
from muxmesh.rpc.channels import internal_channel
from muxmesh.scheduling_policy import FCFS
from router.admission_client import UnitAdmission
from router.expected_work import ExpectedWork
from router.model_changes import ModelChanges
from router.request_metrics import RequestMetrics
from router.served_models import load_models
from router.unit_link import UnitLink
from router.units import Units


def runtime_of(folder: Path, *models: str) -> MeshRuntime:
    unit = {"name": "u", "models": [{"name": name, "engine": "sim"} for name in models]}
    prepared = PreparedModel(folder=None, image=None, weights_fingerprint="w")
    return MeshRuntime(
        config=MeshConfig.model_validate({"units": [unit]}),
        run_dir=folder,
        cache_dir=folder,
        redis_url="unix:///nowhere",
        prepared={"u": dict.fromkeys(models, prepared)},
    )


async def test_a_router_serves_the_models_that_the_runtime_file_names(tmp_path: Path) -> None:
    before = runtime_of(tmp_path, "a", "b")
    models, metrics = load_models(before), RequestMetrics({"a": 8, "b": 8})
    async with internal_channel("unix:/nowhere") as channel:
        admission = UnitAdmission("u", "r", channel, ManualClock(), FCFS)
        stubs = kvstore_pb2_grpc.KvStoreServiceStub(channel), kvstore_pb2_grpc.UnitModelServiceStub(channel)
        link = UnitLink("u", admission, *stubs, {}, ExpectedWork(0.0))
        changes = ModelChanges(before.path, models, Units([link]), metrics)
        runtime_of(tmp_path, "b", "c").write(before.path)
        await changes.read_runtime()
        assert [model.name for model in models] == ["b", "c"]
        assert list(link.models) == ["c"], "b was the caller's to place"
        assert metrics.of("a") is metrics.of("not served") is not metrics.of("c")
        before.path.unlink()
        with pytest.raises(ConfigError, match="cannot be read"):
            await changes.read_runtime()
        assert [model.name for model in models] == ["b", "c"]
