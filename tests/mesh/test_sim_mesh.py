"""The public API, refused input, cancels and faults, on one mesh of real processes with the sim engine."""

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from muxmesh.client import Message, SyncMeshClient
from muxmesh.errors import DeadlineExceeded, InvalidRequest, ModelNotFound, Overloaded, Unavailable
from muxmesh.rpc.status_codes import _rich_status
from muxmesh.v1 import inference_pb2, inference_pb2_grpc
from tests.support.mesh import SIM_MODEL, RunningMesh, collect, running_mesh
from tests.support.processes import ended

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="module")]
SLOW = {"name": "slow", "engine": "sim", "sim": {"base_s": 0.02, "per_token_s": 0.0005}, "max_num_seqs": 4}
UNIT = {"kv_pool": "4MiB", "slab": "64KiB", "models": [SIM_MODEL, SLOW]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningMesh]:
    """Of 53 sequences 13 are kept for the other model, so 40 of one may wait."""
    async with running_mesh(
        tmp_path_factory.mktemp("mesh"), units=[UNIT], router={"max_prompt_bytes": "64KiB", "max_waiting_requests": 53}
    ) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def raw(mesh: RunningMesh) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(mesh.address) as channel:
        yield channel


async def test_a_stream_has_every_token_once(mesh: RunningMesh) -> None:
    text, tokens, finish = await collect(mesh.client.stream("Hello", model="sim", max_new_tokens=50, temperature=0))
    assert len(tokens) == finish.num_output_tokens == 50
    assert finish.reason == "length"
    assert len(text) == 50
    await mesh.until_free()


async def test_generate_and_generate_stream_return_the_same_output(mesh: RunningMesh) -> None:
    options: dict[str, Any] = {"model": "sim", "max_new_tokens": 20, "seed": 7}
    text, tokens, _ = await collect(mesh.client.stream("Hello", **options))
    async with grpc.aio.insecure_channel(mesh.address) as channel:
        unary = await inference_pb2_grpc.InferenceStub(channel).Generate(
            inference_pb2.GenerateRequest(
                model="sim",
                text="Hello",
                sampling=inference_pb2.SamplingOptions(seed=7),
                stopping=inference_pb2.StoppingOptions(max_new_tokens=20),
                response=inference_pb2.ResponseOptions(output_token_ids=True, prompt_token_ids=True),
            )
        )
    assert (unary.outputs.text, list(unary.outputs.token_ids), unary.outputs.num_tokens) == (text, tokens, 20)
    assert unary.prompt_info.num_prompt_tokens == len(unary.prompt_info.token_ids) == 5
    assert unary.prompt_info.seed == 7
    assert unary.timings.e2e_s >= unary.timings.ttft_s >= unary.timings.queue_s >= 0


async def test_one_prompt_can_have_several_sequences(mesh: RunningMesh, raw: grpc.aio.Channel) -> None:
    options: dict[str, Any] = {"model": "sim", "max_new_tokens": 5, "temperature": 1.0, "seed": 4}
    completions = await mesh.client.generate_many("Hello", num_sequences=3, **options)
    assert len(completions) == 3
    assert all(one.finish.num_output_tokens == len(one.token_ids) == 5 for one in completions)
    assert completions[0].token_ids == (await mesh.client.generate("Hello", **options)).token_ids
    with pytest.raises(InvalidRequest, match="generate_many"):
        await mesh.client.generate("Hello", num_sequences=2, **options)  # type: ignore[call-arg]
    unary = await inference_pb2_grpc.InferenceStub(raw).Generate(
        inference_pb2.GenerateRequest(
            model="sim",
            text="Hello",
            temperature=1.0,
            sampling=inference_pb2.SamplingOptions(seed=4, num_sequences=3),
            stopping=inference_pb2.StoppingOptions(max_new_tokens=5),
            response=inference_pb2.ResponseOptions(output_token_ids=True),
        )
    )
    assert [tuple(output.token_ids) for output in unary.all_outputs] == [one.token_ids for one in completions]
    assert [output.index for output in unary.all_outputs] == [0, 1, 2]
    assert unary.outputs == unary.all_outputs[0]
    await mesh.until_free()


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", -5), ("top_k", -2), ("seed", -1), ("priority", 1 << 40), ("num_sequences", 0),
     ("logprobs", 1.5), ("stop_token_ids", [-1]), ("allowed_token_ids", [1 << 33])],
)  # fmt: skip
async def test_the_client_refuses_a_number_that_cannot_be_sent_by_its_name(
    mesh: RunningMesh, name: str, value: Any
) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name}: (is|has) .*a whole number from") as caught:
        await mesh.client.generate_many("a", model="sim", **{name: value})
    assert caught.value.field == name


async def test_one_stop_string_needs_no_list(mesh: RunningMesh) -> None:
    whole = await mesh.client.generate("Hello", model="sim", max_new_tokens=30, temperature=0)
    stop = whole.text[10:12]
    stopped = await mesh.client.generate("Hello", model="sim", max_new_tokens=30, temperature=0, stop_strings=stop)
    assert stopped.finish.stopped_by == stop
    assert stopped.text == whole.text[: whole.text.index(stop)]


async def test_more_sequences_than_max_num_seqs_are_all_generated(mesh: RunningMesh) -> None:
    completions = await mesh.client.generate_many("a", model="sim", max_new_tokens=3, num_sequences=40)
    assert [completion.finish.num_output_tokens for completion in completions] == [3] * 40
    await mesh.until_free()


async def test_the_reported_seed_reproduces_the_output(mesh: RunningMesh) -> None:
    first = await mesh.client.generate("Hello", model="sim", max_new_tokens=20)
    repeated = await mesh.client.generate("Hello", model="sim", max_new_tokens=20, seed=first.prompt.seed)
    other = await mesh.client.generate("Hello", model="sim", max_new_tokens=20)
    assert first.token_ids == repeated.token_ids != other.token_ids


async def prompt_ids(mesh: RunningMesh, **fields: Any) -> list[int]:
    """The token ids of a prompt, as the mesh reports them."""
    request = inference_pb2.GenerateRequest(
        model="sim",
        stopping=inference_pb2.StoppingOptions(max_new_tokens=1),
        response=inference_pb2.ResponseOptions(prompt_token_ids=True),
        **fields,
    )
    responses = [response async for response in mesh.client.stream_request(request)]
    return list(responses[0].prompt_info.token_ids)


async def test_token_ids_chat_and_text_of_one_prompt_have_the_same_tokens(mesh: RunningMesh) -> None:
    rendered = await prompt_ids(mesh, text="user: hi\nassistant: ")
    chat = inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(role="user", content="hi")])
    assert await prompt_ids(mesh, chat=chat) == rendered
    assert await prompt_ids(mesh, token_ids=inference_pb2.TokenIds(ids=rendered)) == rendered
    completion = await mesh.client.generate([Message("user", "hi")], model="sim", max_new_tokens=1)
    assert completion.prompt.num_tokens == 20


async def test_a_stop_string_across_tokens_ends_the_output(mesh: RunningMesh) -> None:
    options: dict[str, Any] = {"model": "sim", "max_new_tokens": 40, "temperature": 0}
    text, _, _ = await collect(mesh.client.stream("Hello", **options))
    stop = text[10:13]
    cut, tokens, finish = await collect(mesh.client.stream("Hello", stop_strings=[stop], **options))
    assert cut == text[: text.index(stop)]
    assert (finish.reason, finish.stopped_by) == ("stop", stop)
    assert len(tokens) == finish.num_output_tokens == text.index(stop) + 3
    kept, _, _ = await collect(mesh.client.stream("Hello", stop_strings=[stop], include_stop_strings=True, **options))
    assert kept == cut + stop
    await mesh.until_free()


async def test_a_stop_token_ends_the_output(mesh: RunningMesh) -> None:
    options: dict[str, Any] = {"model": "sim", "max_new_tokens": 40, "temperature": 0}
    _, tokens, _ = await collect(mesh.client.stream("Hello", **options))
    stop = tokens[8]
    first = tokens.index(stop)
    _, cut, finish = await collect(mesh.client.stream("Hello", stop_token_ids=[stop], **options))
    assert (cut, finish.reason, finish.stopped_by) == (tokens[: first + 1], "stop", stop)
    _, longer, finish = await collect(
        mesh.client.stream("Hello", stop_token_ids=[stop], min_new_tokens=first + 2, **options)
    )
    assert finish.num_output_tokens >= first + 2
    assert stop not in longer[: first + 1]


async def test_truncation_keeps_the_last_tokens_of_the_prompt(mesh: RunningMesh) -> None:
    whole = await prompt_ids(mesh, text="0123456789")
    assert await prompt_ids(mesh, text="0123456789", truncate_prompt_tokens=3) == whole[-3:]


async def test_the_sync_client_returns_the_same_output(mesh: RunningMesh) -> None:
    expected = await mesh.client.generate("Hello", model="sim", max_new_tokens=9, temperature=0)

    def script() -> tuple[str, str, int]:
        with SyncMeshClient(mesh.address) as client:
            completion = client.generate("Hello", model="sim", max_new_tokens=9, temperature=0)
            deltas = list(client.stream("Hello", model="sim", max_new_tokens=9, temperature=0))
            for delta in client.stream("Hello", model="slow", max_new_tokens=500):
                assert delta.num_tokens == 1
                break
            return completion.text, "".join(delta.text for delta in deltas), len(client.list_models())

    assert await asyncio.to_thread(script) == (expected.text, expected.text, 2)
    await mesh.until_free()


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "empty prompt": ({"text": ""}, "text", "is empty"),
    "no tokens": ({"token_ids": {"ids": []}}, "token_ids.ids", "is empty"),
    "no prompt": ({}, "text", "none is set"),
    "both prompt kinds": ({"text": "a", "token_ids": {"ids": [40]}}, "text", "text and token_ids are set"),
    "unknown prompt token": ({"token_ids": {"ids": [40, 259]}}, "token_ids.ids[1]", "token id 259 is unknown"),
    "prompt longer than the context": (
        {"token_ids": {"ids": [40] * 8192}},
        "token_ids.ids",
        "the context holds 8192",
    ),
    "text longer than the context": ({"text": "x" * 8192}, "text", "is 8192 tokens; the context holds 8192"),
    "prompt of too many bytes": ({"text": "x" * 70_000}, "text", "is 70000 bytes; at most 65536"),
    "no messages": ({"chat": {}}, "chat.messages", "is empty"),
    "unknown role": (
        {"chat": {"messages": [{"role": "robot", "content": "x"}]}},
        "chat.messages[0].role",
        "'robot'; one of system, user, assistant",
    ),
    "no content": ({"chat": {"messages": [{"role": "user"}]}}, "chat.messages", "no content"),
    "max_new_tokens 0": ({"text": "a", "stopping": {"max_new_tokens": 0}}, "stopping.max_new_tokens", "at least 1"),
    "max_new_tokens over the limit": (
        {"text": "a", "stopping": {"max_new_tokens": 8192}},
        "stopping.max_new_tokens",
        "so at most 8191",
    ),
    "min_new_tokens over max_new_tokens": (
        {"text": "a", "stopping": {"max_new_tokens": 2, "min_new_tokens": 3}},
        "stopping.min_new_tokens",
        "more than max_new_tokens",
    ),
    "temperature below 0": ({"text": "a", "temperature": -0.1}, "temperature", "between 0 and 100, 0 is greedy"),
    "temperature NaN": ({"text": "a", "temperature": float("nan")}, "temperature", "is nan"),
    "temperature infinite": ({"text": "a", "temperature": float("inf")}, "temperature", "is inf"),
    "top_p 0": ({"text": "a", "sampling": {"top_p": 0.0}}, "sampling.top_p", "more than 0 and at most 1"),
    "top_p over 1": ({"text": "a", "sampling": {"top_p": 1.5}}, "sampling.top_p", "is 1.5"),
    "top_p NaN": ({"text": "a", "sampling": {"top_p": float("nan")}}, "sampling.top_p", "is nan"),
    "unknown stop token": (
        {"text": "a", "stopping": {"stop_token_ids": [3, 900]}},
        "stopping.stop_token_ids[1]",
        "token id 900 is unknown",
    ),
    "empty stop string": (
        {"text": "a", "stopping": {"stop_strings": ["x", ""]}},
        "stopping.stop_strings[1]",
        "is empty",
    ),
    "too many stop strings": (
        {"text": "a", "stopping": {"stop_strings": ["x"] * 65}},
        "stopping.stop_strings",
        "has 65 entries; at most 64",
    ),
    "a stop string too long": (
        {"text": "a", "stopping": {"stop_strings": ["x" * 1025]}},
        "stopping.stop_strings[0]",
        "at most 1024",
    ),
    "too many stop tokens": (
        {"text": "a", "stopping": {"stop_token_ids": [5] * 129}},
        "stopping.stop_token_ids",
        "at most 128",
    ),
    "a request id that cannot be a header": ({"text": "a", "request_id": "é\n"}, "request_id", "printable ASCII"),
    "truncate to more than the context": (
        {"text": "a", "truncate_prompt_tokens": 9000},
        "truncate_prompt_tokens",
        "less than the context",
    ),
    "truncate to nothing": ({"text": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
    "too many sequences": ({"text": "a", "sampling": {"num_sequences": 65}}, "sampling.num_sequences", "at most 64"),
    "a salt that is too long": ({"text": "a", "kv": {"cache_salt": "x" * 257}}, "kv.cache_salt", "at most 256"),
    "min_p": ({"text": "a", "sampling": {"min_p": 1.1}}, "sampling.min_p", "between 0 and 1"),
    "min_p nan": ({"text": "a", "sampling": {"min_p": float("nan")}}, "sampling.min_p", "between 0 and 1"),
    "presence penalty": (
        {"text": "a", "decoding": {"presence_penalty": 2.5}},
        "decoding.presence_penalty",
        "between -2 and 2",
    ),
    "frequency penalty": (
        {"text": "a", "decoding": {"frequency_penalty": float("nan")}},
        "decoding.frequency_penalty",
        "between -2 and 2",
    ),
    "repetition penalty": (
        {"text": "a", "decoding": {"repetition_penalty": -1.0}},
        "decoding.repetition_penalty",
        "more than 0",
    ),
    "logit bias": ({"text": "a", "decoding": {"logit_bias": {5: 101.0}}}, "decoding.logit_bias[5]", "between -100"),
    "bias of an unknown token": (
        {"text": "a", "decoding": {"logit_bias": {999: 1.0}}},
        "decoding.logit_bias[999]",
        "is unknown",
    ),
    "a repetition penalty of 0": (
        {"text": "a", "decoding": {"repetition_penalty": 0.0}},
        "decoding.repetition_penalty",
        "more than 0",
    ),
    "an unknown allowed token": (
        {"text": "a", "decoding": {"allowed_token_ids": [5, 999]}},
        "decoding.allowed_token_ids[1]",
        "is unknown",
    ),
    "a negative seed": ({"text": "a", "sampling": {"seed": -1}}, "sampling.seed", "at least 0"),
    "candidates without log-probabilities": (
        {"text": "a", "response": {"output_candidates": {"top_n": 1}}},
        "response.output_candidates",
        "output_logprobs is not",
    ),
    "only the end is allowed": (
        {"text": "a", "decoding": {"allowed_token_ids": [0]}, "stopping": {"min_new_tokens": 3}},
        "decoding.allowed_token_ids",
        "min_new_tokens is 3",
    ),
    "log-probabilities": (
        {"text": "a", "response": {"output_logprobs": True}},
        "response.output_logprobs",
        "sim engine",
    ),
    "prompt log-probabilities": (
        {"text": "a", "response": {"prompt_logprobs": True}},
        "response.prompt_logprobs",
        "sim engine",
    ),
    "a hint of the length": ({"text": "a", "expected_output_tokens": 0}, "expected_output_tokens", "at least 1"),
    "session": ({"text": "a", "session_id": "s"}, "session_id", "not supported"),
}


@pytest.mark.parametrize("name", BAD)
async def test_invalid_input_is_refused_by_the_name_of_its_field(mesh: RunningMesh, name: str) -> None:
    fields, field, problem = BAD[name]
    request = inference_pb2.GenerateRequest(model="sim", **fields)
    with pytest.raises(InvalidRequest) as caught:
        _ = [response async for response in mesh.client.stream_request(request)]
    assert caught.value.field == field
    assert problem in caught.value.problem


async def test_an_unknown_model_is_not_found(mesh: RunningMesh) -> None:
    with pytest.raises(ModelNotFound, match=r"model: 'gpt' is not served; served: sim, slow"):
        await mesh.client.generate("a", model="gpt")


RAW = {
    "text that is not UTF-8": (b"\x12\x03sim" + b"\x1a\x02\xff\xfe", "text", "not valid UTF-8"),
    "a role that is not UTF-8": (
        b"\x12\x03sim" + b"\xa2\x06\x05" + b"\x0a\x03" + b"\x0a\x01\xff",
        "chat.messages[0].role",
        "not valid UTF-8",
    ),
    "a field of another version": (b"\x12\x03sim" + b"\x1a\x01a" + b"\xf8\x3f\x01", "(number 1023)", "does not know"),
    "garbage": (b"\xff\xff\xff\xff", "GenerateRequest", "malformed"),
}


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_invalid_bytes_are_refused_by_the_name_of_their_field(
    raw: grpc.aio.Channel, name: str, method: str
) -> None:
    message, field, problem = RAW[name]
    path = f"/muxmesh.v1.Inference/{method}"
    unary: Any = raw.unary_unary(path)
    stream: Any = raw.unary_stream(path)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if method == "Generate":
            await unary(message)
        else:
            _ = [response async for response in stream(message)]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = _rich_status(caught.value)
    assert status is not None
    bad_request = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad_request) for detail in status.details)
    assert bad_request.field_violations[0].field == field
    assert problem in bad_request.field_violations[0].description


async def test_a_prompt_above_the_limit_is_refused_with_its_size(mesh: RunningMesh) -> None:
    with pytest.raises(InvalidRequest, match="text: is 65537 bytes; at most 65536"):
        await mesh.client.generate("x" * 65_537, model="sim")
    with pytest.raises(InvalidRequest, match=r"request: is 100000.. bytes; at most"):  # the message is not received
        await mesh.client.generate("x" * 10_000_000, model="sim")


async def test_the_request_id_is_returned_in_the_initial_metadata(raw: grpc.aio.Channel) -> None:
    stub = inference_pb2_grpc.InferenceStub(raw)
    request = inference_pb2.GenerateRequest(model="sim", text="a")
    request.stopping.max_new_tokens = 1
    call = stub.GenerateStream(request, metadata=(("x-request-id", "abc"),))
    assert dict(await call.initial_metadata())["x-request-id"] == "abc"
    assert [response async for response in call]


async def test_every_service_has_health_and_reflection(mesh: RunningMesh, raw: grpc.aio.Channel) -> None:
    runtime = mesh.mesh.runtime
    services = {
        mesh.address: ["muxmesh.v1.Inference", "muxmesh.v1.Mesh"],
        f"unix:{runtime.run_dir}/kvstore-unit0.sock": ["muxmesh.internal.v1.KvStoreService"],
        f"unix:{runtime.run_dir}/prefill-sim.sock": ["muxmesh.internal.v1.PrefillService"],
        f"unix:{runtime.run_dir}/decode-sim.sock": ["muxmesh.internal.v1.DecodeService"],
    }
    for address, names in services.items():
        async with grpc.aio.insecure_channel(address) as channel:
            for name in ("", *names):
                health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
                assert health.status == health_pb2.HealthCheckResponse.SERVING
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            )
            (listed,) = [response async for response in call]
            assert set(names) <= {service.name for service in listed.list_services_response.service}


async def test_status_reports_every_process_and_worker(mesh: RunningMesh) -> None:
    await mesh.client.generate("Hello", model="sim", max_new_tokens=3)

    async def all_registered() -> bool:
        return len((await mesh.client.status()).processes) == 6

    await mesh.until(all_registered)
    status = await mesh.client.status()
    assert status.redis_connected
    assert {process.name for process in status.processes} == {
        "router", "kvstore/unit0", "prefill/sim", "decode/sim", "prefill/slow", "decode/slow",
    }  # fmt: skip
    assert all(worker.ready for worker in status.units[0].workers)
    assert {worker.pid for worker in status.units[0].workers} <= {process.pid for process in status.processes}


async def test_model_info_is_complete(mesh: RunningMesh) -> None:
    info = {model.name: model for model in await mesh.client.list_models()}["sim"]
    assert (info.engine, info.unit, info.max_model_len, info.vocab_size) == ("sim", "unit0", 8192, 259)
    assert info.has_chat_template
    assert list(info.eos_token_ids) == [0]


async def test_requests_that_exceed_the_pool_lose_no_token(tmp_path: Path) -> None:
    """Six outputs of two thirds of the pool each begin together, so the pool is full before any of them ends."""
    model = {
        "name": "sim", "engine": "sim", "max_num_seqs": 6, "kv_answer_tokens": 64, "default_max_new_tokens": 10**6,
    }  # fmt: skip
    unit = {"name": "unit0", "kv_pool": "1MiB", "slab": "64KiB", "models": [model]}
    async with running_mesh(tmp_path, units=[unit]) as small:
        (info,) = await small.client.list_models()
        num_tokens = (1 << 20) // info.kv_bytes_per_token * 2 // 3
        options: dict[str, Any] = {"max_new_tokens": num_tokens, "temperature": 1.0}
        expected = [await small.client.generate("Hello", seed=seed, **options) for seed in range(6)]
        assert all(one.timings.num_restarts == 0 for one in expected)
        completions = await asyncio.gather(*(small.client.generate("Hello", seed=seed, **options) for seed in range(6)))
        assert [one.token_ids for one in completions] == [one.token_ids for one in expected]
        assert sum(one.timings.num_restarts for one in completions) > 0
        await small.until_free()
        (status,) = (await small.unit()).models
        longest = await small.client.generate("Hello", temperature=0, bypass_prefix_cache=True)
        pool_tokens = status.num_free_token_blocks * 16
        assert longest.prompt.num_tokens + len(longest.token_ids) == pool_tokens, "max_new_tokens defaults to what fits"


async def test_lower_priority_numbers_are_admitted_first(mesh: RunningMesh) -> None:
    finished: list[int] = []

    async def generate(priority: int) -> None:
        await mesh.client.generate("Hello", model="slow", max_new_tokens=10, priority=priority)
        finished.append(priority)

    async def counts() -> tuple[int, int]:
        model = next(model for model in (await mesh.unit()).models if model.model == "slow")
        return model.num_leases + model.num_credits, model.num_queued_requests

    async def all_slots_taken() -> bool:
        return (await counts())[0] == 4

    async def all_wait() -> bool:
        return (await counts())[1] == 8

    blockers = [asyncio.create_task(mesh.client.generate("Hello", model="slow", max_new_tokens=1000)) for _ in range(4)]
    await mesh.until(all_slots_taken)
    late = [asyncio.create_task(generate(priority)) for priority in (5, 5, 5, 5, 1, 1, 1, 1)]
    await mesh.until(all_wait)
    for blocker in blockers:
        blocker.cancel()
    await asyncio.gather(*late)
    assert finished == [1] * 4 + [5] * 4
    await asyncio.gather(*blockers, return_exceptions=True)
    await mesh.until_free()


async def test_too_many_waiting_requests_are_refused_with_a_retry_delay(mesh: RunningMesh) -> None:
    """Four run and forty wait, so the next sixteen are refused and no other."""
    admitted: list[asyncio.Task[Any]] = []

    def send(count: int) -> list[asyncio.Task[Any]]:
        call = mesh.client.generate
        return [asyncio.create_task(call("Hello", model="slow", max_new_tokens=8000)) for _ in range(count)]

    async def counts() -> tuple[int, int]:
        model = next(model for model in (await mesh.client.status()).models if model.model == "slow")
        return model.num_requests_running, model.num_requests_waiting

    async def four_run() -> bool:
        return await counts() == (4, 0)

    async def forty_wait() -> bool:
        return await counts() == (4, 40)

    try:
        admitted += send(4)
        await mesh.until(four_run)
        admitted += send(40)
        await mesh.until(forty_wait)
        async with asyncio.timeout(30):
            refused = await asyncio.gather(*send(16), return_exceptions=True)
        assert all(isinstance(error, Overloaded) and error.retry_after_s > 0 for error in refused)
        assert await counts() == (4, 40)
        assert not any(task.done() for task in admitted)
    finally:
        for task in admitted:
            task.cancel()
        await asyncio.gather(*admitted, return_exceptions=True)
    await mesh.until_free()


async def test_a_cancelled_request_leaves_nothing_leased(mesh: RunningMesh) -> None:
    stream = mesh.client.stream("Hello", model="slow", max_new_tokens=5000)
    await anext(stream)
    assert await mesh.num_leases() == 1
    await stream.aclose()
    await mesh.until_free()


async def test_a_passed_deadline_leaves_nothing_leased(mesh: RunningMesh) -> None:
    with pytest.raises(DeadlineExceeded):
        await mesh.client.generate("Hello", model="slow", max_new_tokens=5000, timeout_s=0.3)
    await mesh.until_free()


async def test_a_request_that_would_start_after_its_deadline_is_refused_at_once(mesh: RunningMesh) -> None:
    """Four of the model run at once, for 0.8 s each or longer, so the last of so many starts after seconds."""
    options: dict[str, Any] = {"model": "slow", "max_new_tokens": 40, "ignore_eos": True}
    before = [asyncio.create_task(mesh.client.generate("Hello", **options)) for _ in range(24)]

    async def some_have_started() -> bool:
        return sum(task.done() for task in before) >= 8

    await mesh.until(some_have_started)
    more = [asyncio.create_task(mesh.client.generate("Hello", **options)) for _ in range(20)]
    await asyncio.sleep(0)
    try:
        with pytest.raises(Overloaded, match=r"so it would start in about .* after its deadline") as caught:
            await mesh.client.generate("Hello", timeout_s=0.2, priority=5, **options)
        assert caught.value.retry_after_s > 0
    finally:
        await asyncio.gather(*before, *more)
    await mesh.until_free()


async def test_a_killed_client_leaves_nothing_leased(mesh: RunningMesh) -> None:
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "muxmesh", "generate", "--address", mesh.address, "--model", "slow",
        "--max-new-tokens", "5000", "Hello", stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with ended(started) as client:
        assert client.stdout is not None
        assert await client.stdout.read(1)
        client.kill()
        await client.wait()
    await mesh.until_free()


async def test_a_thousand_random_cancels_leave_nothing_leased(mesh: RunningMesh) -> None:
    rng = random.Random(17)

    async def one() -> None:
        task = asyncio.create_task(
            mesh.client.generate("Hello there", model="sim", max_new_tokens=rng.randint(1, 400), timeout_s=20)
        )
        await asyncio.sleep(rng.choice([0.0, rng.random() * 0.02, rng.random() * 0.2]))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    for _ in range(40):
        await asyncio.gather(*(one() for _ in range(25)))
    await mesh.until_free()
    status = await mesh.client.status()
    assert all(model.num_requests_running == 0 for model in status.models)
    assert not any(worker.num_leases for worker in status.units[0].workers)


@pytest.mark.parametrize("victim", ["decode/slow", "prefill/slow", "kvstore/unit0"])
@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.long), 1.0])
async def test_a_killed_process_delays_requests_and_loses_no_token(
    mesh: RunningMesh, victim: str, temperature: float
) -> None:
    """Six different requests, of which four run and two wait when the victim is killed."""
    options: dict[str, Any] = {
        "model": "slow",
        "max_new_tokens": 40,
        "temperature": temperature,
        "bypass_prefix_cache": True,
    }
    length = 1500 if victim == "prefill/slow" else 5  # prefill takes a second, or one step
    prompts = [[40 + number] * length for number in range(6)]
    requests = [{"prompt": prompt, "seed": seed, **options} for seed, prompt in enumerate(prompts)]
    expected = await asyncio.gather(*(mesh.client.generate(**request) for request in requests))
    assert len({one.token_ids for one in expected}) >= 3
    running = [asyncio.create_task(mesh.client.generate(**request)) for request in requests]
    role = "prefill" if victim == "prefill/slow" else "decode"

    async def is_computing() -> bool:
        workers = (await mesh.unit()).workers
        return any(w.role == role and w.model == "slow" and w.num_leases >= 2 for w in workers)

    await mesh.until(is_computing)
    restarts = mesh.process(victim).num_restarts
    os.kill(mesh.pid(victim), signal.SIGKILL)
    completions = await asyncio.gather(*running)
    assert [one.token_ids for one in completions] == [one.token_ids for one in expected]
    assert [one.text for one in completions] == [one.text for one in expected]
    assert sum(one.timings.num_restarts > 0 for one in completions) >= 2
    assert mesh.process(victim).num_restarts == restarts + 1
    await mesh.until_free()


async def test_a_stopped_worker_is_killed_and_no_token_is_lost(mesh: RunningMesh) -> None:
    """A stopped worker is alive and keeps its leases and perhaps the grant, but makes no progress."""
    options: dict[str, Any] = {"model": "slow", "max_new_tokens": 60, "temperature": 1.0, "seed": 3}
    expected = await mesh.client.generate("Stop here", **options)
    stream = mesh.client.stream("Stop here", **options)
    tokens: list[int] = []
    async for delta in stream:
        tokens += delta.token_ids
        if len(tokens) == 5:
            os.kill(mesh.pid("decode/slow"), signal.SIGSTOP)
    assert tuple(tokens) == expected.token_ids
    await mesh.until_free()


async def test_a_killed_router_is_restarted_and_leaves_nothing_leased(mesh: RunningMesh) -> None:
    stream = mesh.client.stream("Hello", model="slow", max_new_tokens=5000)
    await anext(stream)
    os.kill(mesh.pid("router"), signal.SIGKILL)
    with pytest.raises(Unavailable):
        _ = [delta async for delta in stream]

    async def serves_again() -> bool:
        try:
            await mesh.client.generate("Hello", model="sim", max_new_tokens=2, timeout_s=2)
        except (Unavailable, DeadlineExceeded):
            return False
        return True

    await mesh.until(serves_again)
    await mesh.until_free()


async def test_the_mesh_serves_while_redis_is_down(mesh: RunningMesh) -> None:
    os.kill(mesh.pid("redis"), signal.SIGKILL)
    requests = (mesh.client.generate("Hello", model="sim", max_new_tokens=20) for _ in range(20))
    completions = await asyncio.gather(*requests)
    assert all(completion.finish.num_output_tokens == 20 for completion in completions)

    async def registered_again() -> bool:
        status = await mesh.client.status()
        return status.redis_connected and len(status.processes) == 6

    await mesh.until(registered_again)


async def test_commands_print_json(mesh: RunningMesh) -> None:
    async def call(*arguments: str) -> Any:
        started = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "muxmesh", *arguments, stdout=asyncio.subprocess.PIPE
        )
        async with ended(started) as process:
            out, _ = await process.communicate()
        assert process.returncode == 0
        return json.loads(out)

    common = ("--address", mesh.address, "--json")
    scheduling = ("--explain", "--expected-output-tokens", "3")
    output = await call("generate", *common, "--model", "sim", "--max-new-tokens", "4", *scheduling, "--chat", "Hi")
    assert (output["num_output_tokens"], output["finish_reason"]) == (4, "length")
    assert output["scheduling"]["policy"] == "srtf-aged" and output["scheduling"]["decision"] > 0
    status = await call("status", *common)
    assert status["units"][0]["connected"] is True and status["order_policy"] == "srtf-aged"
    assert [model["name"] for model in await call("model", "list", "--json")] == ["smollm2-135m-instruct"]
