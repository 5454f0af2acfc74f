"""The socket of the supervisor for commands. What these do: tests/mesh/test_living_unit.py."""

from pathlib import Path
from typing import Any, cast

import pytest

from muxmesh.errors import InvalidRequest
from muxmesh.internal.v1 import admin_pb2, admin_pb2_grpc
from muxmesh.rpc.channels import internal_channel
from muxmesh.rpc.status_codes import response_of
from muxmesh.supervisor.admin_service import serving_commands
from muxmesh.supervisor.model_loading import ModelLoading


@pytest.mark.parametrize(("text", "reason"), [("{", "is no JSON"), ("[1]", "must be an object")])
async def test_a_model_that_is_no_object_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    address = f"unix:{tmp_path}/s.ctrl"
    loading = ModelLoading(cast(Any, None))  # no model reaches the mesh
    async with serving_commands(loading, address), internal_channel(address) as channel:
        stub = admin_pb2_grpc.SupervisorAdminServiceStub(channel)
        with pytest.raises(InvalidRequest, match=reason):
            await response_of(stub.LoadModel(admin_pb2.LoadModelRequest(model_json=text)))
