"""The public messages are compared with those of vLLM's `vllm.Inference`: what has one meaning has one encoding."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import FieldDescriptorProto

from muxmesh.v1 import inference_pb2
from router.api.unknown_fields import reserved_fields

FIRST_OWN_NUMBER = 100
VLLM = {
    "GenerateRequest": """
        1 request_id string, 2 model string, 3 text oneof string, 4 token_ids oneof TokenIds,
        5 temperature optional float, 6 sampling SamplingOptions, 7 decoding DecodingOptions,
        8 stopping StoppingOptions, 9 response ResponseOptions, 10 kv KvOptions, 11 truncate_prompt_tokens uint32,
        12 priority int32, 13 session_id optional string, 14 media repeated MediaItem, 15 lora_name string""",
    "TokenIds": "1 ids repeated uint32",
    "SamplingOptions": """
        1 num_sequences uint32, 2 top_k uint32, 3 top_p float, 4 min_p float, 5 seed optional int64""",
    "DecodingOptions": """
        1 presence_penalty float, 2 frequency_penalty float, 3 repetition_penalty float,
        4 logit_bias map<uint32,float>, 5 allowed_token_ids repeated uint32, 6 json oneof string, 7 regex oneof string,
        8 choice oneof StringChoices, 9 grammar oneof string, 10 json_object oneof bool,
        11 structural_tag oneof string""",
    "StoppingOptions": """
        1 max_new_tokens uint32, 2 min_new_tokens uint32, 3 stop_token_ids repeated uint32,
        4 stop_strings repeated string, 5 include_stop_strings bool, 6 ignore_eos bool""",
    "ResponseOptions": """
        1 prompt_token_ids bool, 2 prompt_logprobs bool, 3 prompt_candidates optional CandidateTokens,
        4 output_text optional bool, 5 output_token_ids bool, 6 output_logprobs bool,
        7 output_candidates optional CandidateTokens, 8 skip_special_tokens optional bool""",
    "KvOptions": """
        1 bypass_prefix_cache bool, 2 cache_salt string, 3 kv_transfer_params Struct, 4 ec_transfer_params Struct""",
    "CandidateTokens": "1 top_n oneof uint32, 2 token_ids oneof TokenIds, 3 all oneof bool",
    "GenerateResponse": "1 prompt_info optional PromptInfo, 2 outputs SequenceOutput",
    "SequenceOutput": """
        1 index uint32, 2 text string, 3 num_tokens uint32, 4 token_ids repeated uint32, 5 logprobs repeated float,
        6 ranks repeated uint32, 7 candidate_tokens repeated CandidateTokenInfo, 8 finish_info optional FinishInfo""",
    "PromptInfo": """
        1 num_prompt_tokens uint32, 2 token_ids repeated uint32, 3 logprobs repeated float, 4 ranks repeated uint32,
        5 candidate_tokens repeated CandidateTokenInfo""",
    "FinishInfo": """
        1 num_output_tokens uint32, 2 finish_reason FinishReason, 3 stop_token_id oneof uint32,
        4 eos_token_id oneof uint32, 5 stop_string oneof string, 6 kv_transfer_params Struct,
        8 ec_transfer_params Struct""",
    "CandidateTokenInfo": "1 tokens repeated TokenInfo",
    "CandidateTokenInfo.TokenInfo": "1 id uint32, 2 logprob float, 3 rank uint32",
}
"""The fields of vLLM's messages: number, name, label and type. The messages have their names in MuxMesh: vLLM's are
RandomSampling, DecodingParameters, StoppingCriteria and KVCacheParameters."""
OPTIONAL_HERE = {
    "GenerateRequest": {"text", "truncate_prompt_tokens"},
    "SamplingOptions": {"top_k", "top_p", "min_p"},
    "DecodingOptions": {"repetition_penalty"},
    "StoppingOptions": {"max_new_tokens"},
}
"""Fields that are `optional` here and plain or in a oneof there: one encoding, but a 0 differs from an unset field."""


def vllm_fields(message: str) -> dict[int, tuple[str, str, str]]:
    """Number → name, label and type of the fields of a message."""
    fields = {}
    for field in " ".join(VLLM[message].split()).split(", "):
        number, name, *label, kind = field.split()
        fields[int(number)] = (name, label[0] if label else "plain", kind)
    return fields


def our_descriptor(message: str) -> Descriptor:
    name, _, nested = message.partition(".")
    descriptor = inference_pb2.DESCRIPTOR.message_types_by_name[name]
    return descriptor.nested_types_by_name[nested] if nested else descriptor


def our_fields(message: str) -> dict[int, tuple[str, str, str]]:
    fields = our_descriptor(message).fields
    return {field.number: (field.name, label_of(field), type_of(field)) for field in fields}


def label_of(field: FieldDescriptor) -> str:
    if field.containing_oneof is not None:
        return "optional" if field.containing_oneof.name == f"_{field.name}" else "oneof"
    return "repeated" if field.is_repeated and not type_of(field).startswith("map") else "plain"


def type_of(field: FieldDescriptor) -> str:
    if field.message_type is not None:
        if field.message_type.GetOptions().map_entry:
            return f"map<{','.join(type_of(part) for part in field.message_type.fields)}>"
        return field.message_type.name
    if field.enum_type is not None:
        return field.enum_type.name
    return FieldDescriptorProto.Type.Name(FieldDescriptorProto.Type.ValueType(field.type)).split("_")[1].lower()


@pytest.mark.parametrize("message", VLLM)
def test_every_field_of_vllm_is_here_with_the_same_encoding_or_reserved(message: str) -> None:
    ours, reserved, optional = our_fields(message), reserved_fields(our_descriptor(message)), OPTIONAL_HERE.get(message)
    for number, (name, label, kind) in vllm_fields(message).items():
        if number in reserved:
            assert reserved[number] == name and number not in ours
            continue
        if name in (optional or ()):
            label = "optional"  # noqa: PLW2901
        elif message == "GenerateRequest" and label == "oneof":
            label = "plain"  # noqa: PLW2901 - a message has presence without a oneof
        assert ours.get(number) == (name, label, kind)


@pytest.mark.parametrize("message", VLLM)
def test_every_own_field_has_a_number_that_vllm_does_not_use(message: str) -> None:
    own = our_fields(message).keys() - vllm_fields(message).keys()
    assert all(number >= FIRST_OWN_NUMBER for number in own)


def test_what_is_optional_here_only_needs_to_tell_zero_from_unset() -> None:
    for message, names in OPTIONAL_HERE.items():
        fields = {name: label for name, label, _ in vllm_fields(message).values()}
        assert {fields[name] for name in names} <= {"plain", "oneof"}


def test_finish_reasons_are_those_of_vllm() -> None:
    reasons = inference_pb2.FinishInfo.FinishReason
    assert dict(reasons.items()) == {"NOT_FINISHED": 0, "LENGTH": 1, "STOP": 2, "ABORTED": 3}


def test_the_rpcs_of_vllm_have_their_names_and_their_streaming() -> None:
    methods = inference_pb2.DESCRIPTOR.services_by_name["Inference"].methods_by_name
    for name, streams in (("Generate", False), ("GenerateStream", True)):
        method = methods[name]
        assert (method.input_type.name, method.output_type.name) == ("GenerateRequest", "GenerateResponse")
        assert (method.client_streaming, method.server_streaming) == (False, streams)
