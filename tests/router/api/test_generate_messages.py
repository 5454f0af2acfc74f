"""Messages to values and back. The tables are compared with the descriptors: a new public field needs an entry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from muxmesh.errors import InvalidRequest
from muxmesh.execution import Execution, PreemptionReason
from muxmesh.models.token_texts import TokenText
from muxmesh.types import Candidate, Sampling, TokenLogprobs, Waits
from muxmesh.v1 import inference_pb2
from router.api.generate_messages import message_from_delta, request_from_message
from router.generation import (
    ChatMessage,
    ChatPrompt,
    FinishKind,
    GenerationRequest,
    OutputDelta,
    OutputFinish,
    OutputOptions,
    PromptReport,
    SchedulingReport,
    SequenceDelta,
    StoppingOptions,
    TextPrompt,
    TimingsReport,
    TokensPrompt,
)

MODEL_DEFAULTS = frozenset({"temperature", "top_k", "top_p", "min_p", "repetition_penalty"})
"""The fields of `Sampling` that have the model's own defaults."""
REQUEST = GenerationRequest("m", TextPrompt("hi"), unset_sampling=MODEL_DEFAULTS)


def request_message(**fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(**fields)


def response_message(**fields: Any) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(**fields)


def leaf_paths(descriptor: Descriptor, path: str = "") -> Iterator[str]:
    """Paths of all fields that are no messages, in a message and in those below it."""
    for field in descriptor.fields:
        nested = field.message_type
        if nested is None or nested.GetOptions().map_entry:
            yield path + field.name
        else:
            yield from leaf_paths(nested, f"{path}{field.name}.")


def sampling(**changes: Any) -> GenerationRequest:
    return replace(REQUEST, sampling=Sampling(**changes), unset_sampling=MODEL_DEFAULTS - changes.keys())


def stopping(**changes: Any) -> GenerationRequest:
    return replace(REQUEST, stopping=StoppingOptions(**changes))


def output(**changes: Any) -> GenerationRequest:
    return replace(REQUEST, output=OutputOptions(**changes))


CHAT = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]}
CHAT_PROMPT = ChatPrompt((ChatMessage("system", "Be brief."), ChatMessage("user", "hi")))

REQUEST_FIELDS: dict[str, tuple[dict[str, Any], GenerationRequest]] = {
    "request_id": ({"request_id": "r"}, replace(REQUEST, request_id="r")),
    "model": ({"model": "n"}, replace(REQUEST, model="n")),
    "text": ({"text": "other"}, replace(REQUEST, prompt=TextPrompt("other"))),
    "token_ids.ids": ({"token_ids": {"ids": [5, 4]}}, replace(REQUEST, prompt=TokensPrompt([5, 4]))),
    "chat.messages.role": ({"chat": CHAT}, replace(REQUEST, prompt=CHAT_PROMPT)),
    "chat.messages.content": ({"chat": CHAT}, replace(REQUEST, prompt=CHAT_PROMPT)),
    "temperature": ({"temperature": 0.0}, sampling(temperature=0.0)),
    "sampling.num_sequences": ({"sampling": {"num_sequences": 3}}, replace(REQUEST, num_sequences=3)),
    "sampling.top_k": ({"sampling": {"top_k": 7}}, sampling(top_k=7)),
    "sampling.top_p": ({"sampling": {"top_p": 0.0}}, sampling(top_p=0.0)),
    "sampling.min_p": ({"sampling": {"min_p": 0.5}}, sampling(min_p=0.5)),
    "sampling.seed": ({"sampling": {"seed": 0}}, replace(REQUEST, seed=0)),
    "decoding.presence_penalty": ({"decoding": {"presence_penalty": 0.5}}, sampling(presence_penalty=0.5)),
    "decoding.frequency_penalty": ({"decoding": {"frequency_penalty": -0.5}}, sampling(frequency_penalty=-0.5)),
    "decoding.repetition_penalty": ({"decoding": {"repetition_penalty": 1.5}}, sampling(repetition_penalty=1.5)),
    "decoding.logit_bias": ({"decoding": {"logit_bias": {9: -1.5}}}, sampling(logit_bias=((9, -1.5),))),
    "decoding.allowed_token_ids": ({"decoding": {"allowed_token_ids": [9, 3]}}, sampling(allowed_token_ids=(9, 3))),
    "stopping.max_new_tokens": ({"stopping": {"max_new_tokens": 0}}, stopping(max_new_tokens=0)),
    "stopping.min_new_tokens": ({"stopping": {"min_new_tokens": 4}}, stopping(min_new_tokens=4)),
    "stopping.stop_token_ids": ({"stopping": {"stop_token_ids": [8, 9]}}, stopping(stop_token_ids=[8, 9])),
    "stopping.stop_strings": ({"stopping": {"stop_strings": ["a", "b"]}}, stopping(stop_strings=["a", "b"])),
    "stopping.include_stop_strings": (
        {"stopping": {"include_stop_strings": True}},
        stopping(include_stop_strings=True),
    ),
    "stopping.ignore_eos": ({"stopping": {"ignore_eos": True}}, stopping(ignore_eos=True)),
    "response.prompt_token_ids": ({"response": {"prompt_token_ids": True}}, output(prompt_token_ids=True)),
    "response.prompt_logprobs": (
        {"response": {"prompt_logprobs": True}},
        replace(sampling(prompt_logprobs=0), output=OutputOptions(prompt_logprobs=True)),
    ),
    "response.prompt_candidates.top_n": (
        {"response": {"prompt_logprobs": True, "prompt_candidates": {"top_n": 5}}},
        replace(sampling(prompt_logprobs=5), output=OutputOptions(prompt_logprobs=True)),
    ),
    "response.output_text": ({"response": {"output_text": False}}, output(text=False)),
    "response.output_token_ids": ({"response": {"output_token_ids": True}}, output(token_ids=True)),
    "response.output_logprobs": ({"response": {"output_logprobs": True}}, sampling(logprobs=0)),
    "response.output_candidates.top_n": (
        {"response": {"output_logprobs": True, "output_candidates": {"top_n": 5}}},
        sampling(logprobs=5),
    ),
    "response.skip_special_tokens": ({"response": {"skip_special_tokens": False}}, output(skip_special_tokens=False)),
    "response.scheduling": ({"response": {"scheduling": True}}, output(scheduling=True)),
    "kv.bypass_prefix_cache": ({"kv": {"bypass_prefix_cache": True}}, replace(REQUEST, bypass_prefix_cache=True)),
    "kv.cache_salt": ({"kv": {"cache_salt": "s"}}, replace(REQUEST, cache_salt="s")),
    "kv.swap_format": (
        {"kv": {"swap_format": inference_pb2.KV_SWAP_FORMAT_INT8}},
        replace(REQUEST, kv_swap_format="int8"),
    ),
    "truncate_prompt_tokens": ({"truncate_prompt_tokens": 0}, replace(REQUEST, truncate_prompt_tokens=0)),
    "priority": ({"priority": -3}, replace(REQUEST, priority=-3)),
    "expected_output_tokens": ({"expected_output_tokens": 0}, replace(REQUEST, expected_output_tokens=0)),
}
"""Path of a field → the message with that field alone, and its request."""
UNSUPPORTED = {"session_id"}


def test_every_field_of_a_request_is_in_the_table_or_refused() -> None:
    descriptor = inference_pb2.GenerateRequest.DESCRIPTOR
    assert set(leaf_paths(descriptor)) == set(REQUEST_FIELDS) | UNSUPPORTED


@pytest.mark.parametrize("path", REQUEST_FIELDS)
def test_each_field_of_a_message_changes_its_own_field_of_the_request(path: str) -> None:
    fields, expected = REQUEST_FIELDS[path]
    message = request_message(**fields)
    if not message.model:
        message.model = "m"
    if not any(message.HasField(name) for name in ("text", "token_ids", "chat")):
        message.text = "hi"
    request = request_from_message(message)
    assert listed(request) == listed(expected)
    assert listed(request) != listed(REQUEST)


def listed(request: GenerationRequest) -> GenerationRequest:
    """The request with lists for protobuf's own sequences, so that it can be compared."""
    options = request.stopping
    stopping = replace(options, stop_token_ids=list(options.stop_token_ids), stop_strings=list(options.stop_strings))
    prompt = request.prompt
    if isinstance(prompt, TokensPrompt):
        prompt = TokensPrompt(list(prompt.token_ids))
    return replace(request, stopping=stopping, prompt=prompt)


def test_the_defaults_of_the_wire_are_those_of_the_request() -> None:
    assert listed(request_from_message(request_message(model="m", text="hi"))) == listed(REQUEST)
    explicit = request_message(
        model="m",
        text="hi",
        temperature=1.0,
        sampling={"num_sequences": 1, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        decoding={"repetition_penalty": 1.0},
        stopping={},
        response={"output_text": True, "skip_special_tokens": True},
        kv={"swap_format": inference_pb2.KV_SWAP_FORMAT_UNSPECIFIED},
    )
    assert listed(request_from_message(explicit)) == listed(replace(REQUEST, unset_sampling=frozenset()))


@pytest.mark.parametrize("swap_format", inference_pb2.KvSwapFormat.keys())
def test_every_swap_format_is_known(swap_format: str) -> None:
    message = request_message(text="hi", kv={"swap_format": swap_format})
    expected = None if swap_format.endswith("_UNSPECIFIED") else swap_format.rpartition("_")[2].lower()
    assert request_from_message(message).kv_swap_format == expected


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no prompt": ({}, "text", "exactly one of text, token_ids, chat is needed; none is set"),
    "two prompts": (
        {"text": "a", "chat": CHAT},
        "text",
        "exactly one of text, token_ids, chat is needed; text and chat are set",
    ),
    "an empty prompt beside another": (
        {"token_ids": {}, "chat": {}},
        "token_ids",
        "exactly one of text, token_ids, chat is needed; token_ids and chat are set",
    ),
    "a session": ({"text": "a", "session_id": ""}, "session_id", "is not supported by this mesh yet; leave it out"),
    "an unknown swap format": (
        {"text": "a", "kv": {"swap_format": 7}},
        "kv.swap_format",
        "is 7; one of: KV_SWAP_FORMAT_UNSPECIFIED, KV_SWAP_FORMAT_RAW, KV_SWAP_FORMAT_INT8",
    ),
    "output candidates without log-probabilities": (
        {"text": "a", "response": {"output_candidates": {"top_n": 2}}},
        "response.output_candidates",
        "is set, but output_logprobs is not",
    ),
    "prompt candidates without log-probabilities": (
        {"text": "a", "response": {"prompt_candidates": {}}},
        "response.prompt_candidates",
        "is set, but prompt_logprobs is not",
    ),
    "too many chat messages": (
        {"chat": {"messages": [{"role": "user"}] * 1025}},
        "chat.messages",
        "has 1025 entries; at most 1024",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_message_that_is_no_request_is_refused_by_the_name_of_its_field(name: str) -> None:
    fields, field, problem = REFUSED[name]
    with pytest.raises(InvalidRequest) as caught:
        request_from_message(request_message(**fields))
    assert (caught.value.field, caught.value.problem) == (field, problem)


def test_an_unknown_field_of_a_request_is_refused() -> None:
    message = request_message(text="hi")
    message.sampling.MergeFromString(b"\xf8\x3f\x01")  # field 1023, the number 1
    with pytest.raises(InvalidRequest, match=r"^sampling\.\(number 1023\): is a field that this mesh does not know"):
        request_from_message(message)


POSITION = TokenLogprobs(Candidate(3, -0.5, 1), (Candidate(3, -0.5, 1), Candidate(4, -1.5, 2)))
DELTA = OutputDelta(
    index=2,
    new=SequenceDelta((3, 4), "ab", (POSITION, POSITION), OutputFinish(FinishKind.STOP_TOKEN, 9, token_id=4)),
    prompt=PromptReport((40, 41, 42), 2, 2**53 - 1, 12, (POSITION, POSITION)),
    scheduling=SchedulingReport(
        *("srtf", "because", 10.5, 20.5, "hint", 0.25, 0.5, 0.75, 6, 5),
        Waits(1.5, 2.5, 3.5, 4.5, 5.5),
        unit="unit-0",
        unit_reason="unit-0: free",
    ),
    timings=TimingsReport(0.125, 0.25, 0.5, 3, 0.0625, met_slo=True),
    execution=Execution(
        {PreemptionReason.ORDER: 2, PreemptionReason.KV_FULL: 1}, 4, 1, 6.5, 7.5, 8.5, 9.5, is_overdue=True
    ),
)
TEXTS = {3: TokenText(" é", " é".encode()), 4: TokenText("\ufffd", b"\xc3"), 40: TokenText("p", b"p")}
EVERYTHING = OutputOptions(text=True, token_ids=True, prompt_token_ids=True, prompt_logprobs=True)


def test_every_part_of_a_delta_is_in_its_message() -> None:
    other = {"tokens": [{"id": 4, "logprob": -1.5, "rank": 2, "text": "\ufffd", "token_bytes": b"\xc3"}]}
    assert message_from_delta(DELTA, EVERYTHING, TEXTS) == response_message(
        outputs={
            "index": 2,
            "text": "ab",
            "num_tokens": 2,
            "token_ids": [3, 4],
            "logprobs": [-0.5, -0.5],
            "ranks": [1, 1],
            "candidate_tokens": [other, other],
            "token_texts": [" é", " é"],
            "token_bytes": [" é".encode()] * 2,
            "finish_info": {
                "num_output_tokens": 9,
                "finish_reason": inference_pb2.FinishInfo.STOP,
                "stop_token_id": 4,
            },
        },
        prompt_info={
            "num_prompt_tokens": 3,
            "token_ids": [40, 41, 42],
            "num_cached_tokens": 2,
            "seed": 2**53 - 1,
            "predicted_output_tokens": 12,
            "logprobs": [0.0, -0.5, -0.5],
            "ranks": [0, 1, 1],
            "candidate_tokens": [{}, other, other],
            "token_texts": ["p", " é", " é"],
            "token_bytes": [b"p", " é".encode(), " é".encode()],
        },
        scheduling={
            "policy": "srtf",
            "reason": "because",
            "p50_output_tokens": 10.5,
            "p90_output_tokens": 20.5,
            "source": "hint",
            "prefill_s": 0.25,
            "decode_s": 0.5,
            "waited_s": 0.75,
            "decision": 6,
            "num_overtaken": 5,
            "waited_for": {"slot_s": 1.5, "kv_s": 2.5, "order_s": 3.5, "worker_s": 4.5, "device_s": 5.5},
            "unit": "unit-0",
            "unit_reason": "unit-0: free",
        },
        timings={
            "queue_s": 0.125,
            "ttft_s": 0.25,
            "e2e_s": 0.5,
            "num_restarts": 3,
            "router_s": 0.0625,
            "met_slo": True,
        },
        execution={
            "preemptions": {"order": 2, "kv_full": 1},
            "num_repredictions": 4,
            "num_recomputed": 1,
            "batched_s": 6.5,
            "paused_s": 7.5,
            "swapped_s": 8.5,
            "recomputed_s": 9.5,
            "is_overdue": True,
        },
    )


def set_paths(message: Message, path: str = "") -> Iterator[str]:
    """Paths of the fields that are set and are no messages."""
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            yield path + field.name
        else:
            for inner in value if field.is_repeated else (value,):
                yield from set_paths(inner, f"{path}{field.name}.")


FINISHES = {
    FinishKind.LENGTH: (OutputFinish(FinishKind.LENGTH, 9), "LENGTH", None, None),
    FinishKind.EOS: (OutputFinish(FinishKind.EOS, 9, token_id=0), "STOP", "eos_token_id", 0),
    FinishKind.STOP_TOKEN: (OutputFinish(FinishKind.STOP_TOKEN, 9, token_id=4), "STOP", "stop_token_id", 4),
    FinishKind.STOP_STRING: (OutputFinish(FinishKind.STOP_STRING, 9, stop_string="x"), "STOP", "stop_string", "x"),
}


def finished(finish: OutputFinish) -> inference_pb2.GenerateResponse:
    return message_from_delta(replace(DELTA, new=replace(DELTA.new, finish=finish)), EVERYTHING, TEXTS)


def test_every_field_of_a_response_is_set_by_some_delta() -> None:
    descriptor = inference_pb2.GenerateResponse.DESCRIPTOR
    found = {path for finish, *_ in FINISHES.values() for path in set_paths(finished(finish))}
    by_generate_only = {path for path in leaf_paths(descriptor) if path.startswith("all_outputs.")}
    assert found | by_generate_only == set(leaf_paths(descriptor))


@pytest.mark.parametrize("kind", FinishKind, ids=lambda kind: kind.name)
def test_a_finish_names_its_reason_and_what_caused_it(kind: FinishKind) -> None:
    finish, reason, cause, value = FINISHES[kind]
    info = finished(finish).outputs.finish_info
    assert (info.num_output_tokens, info.FinishReason.Name(info.finish_reason)) == (9, reason)
    assert info.WhichOneof("stop_reason") == cause
    assert cause is None or getattr(info, cause) == value


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        (replace(EVERYTHING, text=False), "outputs.text"),
        (replace(EVERYTHING, token_ids=False), "outputs.token_ids"),
        (replace(EVERYTHING, prompt_token_ids=False), "prompt_info.token_ids"),
        (
            replace(EVERYTHING, prompt_logprobs=False),
            "prompt_info.token_texts prompt_info.token_bytes prompt_info.candidate_tokens.tokens.text "
            "prompt_info.candidate_tokens.tokens.token_bytes "
            "prompt_info.logprobs prompt_info.ranks "
            "prompt_info.candidate_tokens.tokens.id prompt_info.candidate_tokens.tokens.logprob "
            "prompt_info.candidate_tokens.tokens.rank",
        ),
    ],
)
def test_what_the_client_does_not_want_is_left_out_and_nothing_else(options: OutputOptions, absent: str) -> None:
    everything = set(set_paths(message_from_delta(DELTA, EVERYTHING, TEXTS)))
    assert everything - set(set_paths(message_from_delta(DELTA, options, TEXTS))) == set(absent.split())


def test_a_delta_in_the_middle_has_only_its_output() -> None:
    message = message_from_delta(OutputDelta(0, SequenceDelta((3,), "")), EVERYTHING, TEXTS)
    assert message == response_message(outputs={"num_tokens": 1, "token_ids": [3]})
    assert [field.name for field, _ in message.ListFields()] == ["outputs"]


def test_a_length_that_was_not_predicted_is_unset() -> None:
    assert DELTA.prompt is not None
    message = message_from_delta(
        replace(DELTA, prompt=replace(DELTA.prompt, predicted_output_tokens=None)), EVERYTHING, TEXTS
    )
    assert not message.prompt_info.HasField("predicted_output_tokens")
