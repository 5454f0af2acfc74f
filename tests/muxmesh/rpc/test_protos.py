"""Every RPC of the protos is implemented, the generated code is current, and names shared with vLLM do not change."""

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
from router.api.inference_service import InferenceService
from router.api.mesh_service import MeshService

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


VLLM = {
    "GenerateRequest": "request_id 1 model 2 text 3 token_ids 4 temperature 5 sampling 6 decoding 7 stopping 8 "
    "response 9 kv 10 truncate_prompt_tokens 11 priority 12 session_id 13",
    "TokenIds": "ids 1",
    "SamplingOptions": "num_sequences 1 top_k 2 top_p 3 min_p 4 seed 5",
    "DecodingOptions": "presence_penalty 1 frequency_penalty 2 repetition_penalty 3 logit_bias 4 allowed_token_ids 5",
    "StoppingOptions": "max_new_tokens 1 min_new_tokens 2 stop_token_ids 3 stop_strings 4 include_stop_strings 5 "
    "ignore_eos 6",
    "ResponseOptions": "prompt_token_ids 1 prompt_logprobs 2 output_text 4 output_token_ids 5 output_logprobs 6 "
    "skip_special_tokens 8",
    "KvOptions": "bypass_prefix_cache 1 cache_salt 2",
    "GenerateResponse": "prompt_info 1 outputs 2",
    "SequenceOutput": "index 1 text 2 num_tokens 3 token_ids 4 finish_info 8",
    "FinishInfo": "num_output_tokens 1 finish_reason 2 stop_token_id 3 eos_token_id 4 stop_string 5",
}


@pytest.mark.parametrize("name", VLLM)
def test_field_names_and_numbers_are_those_of_vllm(name: str) -> None:
    fields = inference_pb2.DESCRIPTOR.message_types_by_name[name].fields
    words = VLLM[name].split()
    expected = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    assert {field.name: field.number for field in fields if field.number < 100} == expected


def test_finish_reasons_are_those_of_vllm() -> None:
    reasons = inference_pb2.FinishInfo.FinishReason
    assert dict(reasons.items()) == {"NOT_FINISHED": 0, "LENGTH": 1, "STOP": 2, "ABORTED": 3}
