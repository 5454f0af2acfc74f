"""Every RPC of the protos is implemented, and the generated code is current."""

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import ServiceDescriptor

from decode_svc.service import DecodeService
from kvstore.model_service import ModelService
from kvstore.service import KvStoreService
from muxmesh.internal.v1 import admin_pb2, decode_pb2, kvstore_pb2, prefill_pb2
from muxmesh.supervisor.admin_service import SupervisorAdminService
from muxmesh.v1 import inference_pb2, mesh_pb2
from prefill_svc.service import PrefillService
from router.admin_service import RouterAdminService
from router.api.inference_service import InferenceService
from router.api.mesh_service import MeshService

ROOT = Path(__file__).resolve().parents[3]
SERVED = {
    inference_pb2.DESCRIPTOR.services_by_name["Inference"]: InferenceService,
    mesh_pb2.DESCRIPTOR.services_by_name["Mesh"]: MeshService,
    prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"]: PrefillService,
    decode_pb2.DESCRIPTOR.services_by_name["DecodeService"]: DecodeService,
    kvstore_pb2.DESCRIPTOR.services_by_name["KvStoreService"]: KvStoreService,
    kvstore_pb2.DESCRIPTOR.services_by_name["UnitModelService"]: ModelService,
    admin_pb2.DESCRIPTOR.services_by_name["RouterAdminService"]: RouterAdminService,
    admin_pb2.DESCRIPTOR.services_by_name["SupervisorAdminService"]: SupervisorAdminService,
}


@pytest.mark.parametrize("service", SERVED, ids=lambda service: service.name)
def test_every_rpc_is_implemented(service: ServiceDescriptor) -> None:
    assert [method.name for method in service.methods if method.name not in vars(SERVED[service])] == []


def test_every_service_of_the_protos_is_served() -> None:
    declared = {
        f"{path.parent.relative_to(ROOT / 'protos')}".replace("/", ".") + "." + line.split()[1]
        for path in (ROOT / "protos").rglob("*.proto")
        for line in path.read_text().splitlines()
        if line.startswith("service ")
    }
    assert declared == {service.full_name for service in SERVED}


def test_the_generated_code_is_up_to_date() -> None:
    checked = subprocess.run(
        [sys.executable, "scripts/gen_protos.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
