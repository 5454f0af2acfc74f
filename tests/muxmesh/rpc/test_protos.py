"""The protos are what the code serves, and the generated code is what the protos say."""

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import ServiceDescriptor

from decode_svc.service import DecodeService
from kvstore.service import KvStoreService
from muxmesh.internal.v1 import decode_pb2, kvstore_pb2, prefill_pb2
from muxmesh.v1 import inference_pb2, mesh_pb2
from prefill_svc.service import PrefillService
from router.service import InferenceService, MeshService

ROOT = Path(__file__).resolve().parents[3]
SERVED = {
    inference_pb2.DESCRIPTOR.services_by_name["Inference"]: InferenceService,
    mesh_pb2.DESCRIPTOR.services_by_name["Mesh"]: MeshService,
    prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"]: PrefillService,
    decode_pb2.DESCRIPTOR.services_by_name["DecodeService"]: DecodeService,
    kvstore_pb2.DESCRIPTOR.services_by_name["KvStoreService"]: KvStoreService,
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


def test_names_and_numbers_that_mirror_vllm_stay() -> None:
    request = inference_pb2.GenerateRequest.DESCRIPTOR
    assert {field.name: field.number for field in request.fields if field.number < 100} == {
        "request_id": 1, "model": 2, "text": 3, "token_ids": 4, "temperature": 5, "sampling": 6, "decoding": 7,
        "stopping": 8, "response": 9, "kv": 10, "truncate_prompt_tokens": 11, "priority": 12, "session_id": 13,
    }  # fmt: skip
