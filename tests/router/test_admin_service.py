"""Commands that no unit could carry out. What units do with the others: tests/mesh/test_living_unit.py."""

import pytest

from muxmesh.clock import ManualClock
from muxmesh.config.model_config import ModelConfig
from muxmesh.errors import ModelNotFound
from muxmesh.internal.v1 import kvstore_pb2_grpc
from muxmesh.rpc.channels import internal_channel
from muxmesh.scheduling_policy import FCFS
from router.admin_service import units_with
from router.admission_client import UnitAdmission
from router.expected_work import ExpectedWork
from router.unit_link import PlacedModel, UnitLink
from router.units import Units
from tests.support.pipeline_parts import IDENTITY


async def test_a_command_names_a_model_and_a_unit_that_has_it() -> None:
    async with internal_channel("unix:/nowhere") as channel:
        stubs = kvstore_pb2_grpc.KvStoreServiceStub(channel), kvstore_pb2_grpc.UnitModelServiceStub(channel)
        admission = UnitAdmission("u", "r", channel, ManualClock(), FCFS)
        placed = {name: PlacedModel(ModelConfig(name=name), IDENTITY) for name in "mn"}
        units = Units(
            [
                UnitLink("a", admission, *stubs, placed, ExpectedWork(0.0)),
                UnitLink("b", admission, *stubs, {"m": placed["m"]}, ExpectedWork(0.0)),
            ]
        )
        assert [link.name for link in units_with(units, "m", "")] == ["a", "b"]
        assert [link.name for link in units_with(units, "m", "b")] == ["b"]
        with pytest.raises(ModelNotFound, match="'x' is not on any unit; there are: m, n"):
            units_with(units, "x", "")
        with pytest.raises(ModelNotFound, match="'n' is not on unit 'b'; it is on: a"):
            units_with(units, "n", "b")
