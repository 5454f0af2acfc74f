"""The Inference service on a real server, over a pipeline whose attempts are scripted."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from muxmesh.config.schema import RouterConfig
from muxmesh.engine.api import Tokens
from muxmesh.errors import EngineFailed, InternalError, InvalidRequest, MeshError, ModelNotFound, Overloaded
from muxmesh.rpc.channels import internal_channel
from muxmesh.rpc.status_codes import from_rpc_error
from muxmesh.types import Candidate, EngineRequest, Finish, FinishReason, TokenLogprobs
from muxmesh.v1 import inference_pb2, inference_pb2_grpc
from router.api.inference_service import InferenceService
from router.api.request_observer import RequestObserver
from router.attempt import Prefilled
from router.served_models import ServedModel
from tests.support.fake_unit import serving
from tests.support.pipeline_parts import (
    PipelineParts,
    Script,
    Step,
    pipeline_parts,
    served_model,
    tokens_of,
    until,
    writes,
)

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"]


@dataclass
class Setup:
    parts: PipelineParts
    stub: inference_pb2_grpc.InferenceAsyncStub

    async def stream(self, request: inference_pb2.GenerateRequest) -> list[inference_pb2.GenerateResponse]:
        return [response async for response in self.stub.GenerateStream(request)]


@asynccontextmanager
async def service(tmp_path: Path, script: Script, *models: ServedModel, **options: Any) -> AsyncIterator[Setup]:
    async with pipeline_parts(script, *models, **options) as parts:
        served = InferenceService(
            parts.pipeline, parts.clock, random.Random(3), RequestObserver(parts.metrics, parts.clock)
        )
        add = functools.partial(inference_pb2_grpc.add_InferenceServicer_to_server, served)
        async with (
            serving(tmp_path / "r.sock", {SERVICE: add}) as address,
            internal_channel(address) as channel,
        ):
            yield Setup(parts, inference_pb2_grpc.InferenceStub(channel))


def request(**fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(**{"model": "m", "text": "hello", **fields})


ALL_PARTS = {"output_token_ids": True, "prompt_token_ids": True, "scheduling": True, "output_logprobs": True}


def writes_with_logprobs(text: str) -> Script:
    def script(engine_request: EngineRequest) -> Iterable[Step]:
        for step in writes(text, Finish(FinishReason.EOS, 0))(engine_request):
            if isinstance(step, Tokens):
                logprobs = tuple(TokenLogprobs(Candidate(token_id, -0.5, 1)) for token_id in step.token_ids)
                yield Tokens(step.start_index, step.token_ids, logprobs)
            else:
                yield step

    return script


async def test_a_stream_sends_a_message_for_each_delta(tmp_path: Path) -> None:
    async with service(tmp_path, writes("abc")) as setup:
        responses = await setup.stream(request())
    assert [(response.outputs.text, response.outputs.num_tokens) for response in responses] == [
        ("a", 1), ("b", 1), ("c", 1), ("", 0),
    ]  # fmt: skip
    assert [response.HasField("prompt_info") for response in responses] == [True, False, False, False]
    assert [response.HasField("timings") for response in responses] == [False, False, False, True]
    assert responses[-1].outputs.finish_info.num_output_tokens == 3


async def test_generate_merges_the_messages_of_a_stream(tmp_path: Path) -> None:
    message = request(response=ALL_PARTS, sampling={"seed": 3})
    async with service(tmp_path, writes_with_logprobs("abc")) as setup:
        streamed = await setup.stream(message)
        whole = await setup.stub.Generate(message)
    outputs = [response.outputs for response in streamed]
    assert whole.outputs.text == "".join(output.text for output in outputs) == "abc"
    assert whole.outputs.num_tokens == sum(output.num_tokens for output in outputs) == 3
    assert tuple(whole.outputs.token_ids) == tokens_of("abc")
    assert list(whole.outputs.token_texts) == ["a", "b", "c"]
    assert list(whole.outputs.token_bytes) == [b"a", b"b", b"c"]
    assert list(whole.outputs.logprobs) == [-0.5] * 3 and list(whole.outputs.ranks) == [1] * 3
    assert whole.outputs.finish_info == outputs[-1].finish_info
    assert whole.prompt_info.token_ids == streamed[0].prompt_info.token_ids
    assert whole.timings == streamed[-1].timings
    assert whole.scheduling.policy == "fcfs"
    assert len(whole.all_outputs) == 0


async def test_generate_lists_several_outputs_by_their_index(tmp_path: Path) -> None:
    async with service(tmp_path, lambda one: writes("abc"[one.sequence_index] * 2)(one)) as setup:
        whole = await setup.stub.Generate(request(sampling={"num_sequences": 3}))
    assert [(output.index, output.text, output.num_tokens) for output in whole.all_outputs] == [
        (0, "aa", 2), (1, "bb", 2), (2, "cc", 2),
    ]  # fmt: skip
    assert whole.outputs == whole.all_outputs[0]


async def request_ids(
    setup: Setup, message: inference_pb2.GenerateRequest, *metadata: tuple[str, str]
) -> tuple[str, str]:
    """The id that the client receives, and the one that the workers receive."""
    call = setup.stub.GenerateStream(message, metadata=metadata)
    initial: Any = await call.initial_metadata()
    _ = [response async for response in call]
    return dict(initial)["x-request-id"], setup.parts.attempts.requests[-1].request_id


async def test_the_request_id_comes_from_the_message_else_from_the_metadata_else_from_the_router(
    tmp_path: Path,
) -> None:
    async with service(tmp_path, writes("x")) as setup:
        header = ("x-request-id", "from-metadata")
        assert await request_ids(setup, request(request_id="from-message"), header) == ("from-message",) * 2
        assert await request_ids(setup, request(), header) == ("from-metadata",) * 2
        first, second = [await request_ids(setup, request()) for _ in range(2)]
    assert first[0] == first[1] != second[0] == second[1]
    assert first[0] == f"{random.Random(3).getrandbits(64):016x}"


async def test_a_request_id_that_cannot_be_logged_is_refused_in_the_metadata_too(tmp_path: Path) -> None:
    async with service(tmp_path, writes("x")) as setup:
        call = setup.stub.GenerateStream(request(), metadata=(("x-request-id", "x" * 129),))
        assert isinstance(await error_of(call), InvalidRequest)
    assert setup.parts.attempts.requests == []


async def error_of(call: Any) -> MeshError:
    """The error of a stream that fails, as the mesh's own client sees it."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [response async for response in call]
    return from_rpc_error(caught.value)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": "x"}, ModelNotFound, "model: 'x' is not served; served: m"),
        ({"text": ""}, InvalidRequest, "text: is empty"),
        ({"session_id": "s"}, InvalidRequest, "session_id: is not supported by this mesh yet; leave it out"),
        ({"text": "x" * 100}, InvalidRequest, "text: is 100 tokens; the context holds 100, at least 1 for the output"),
    ],
)
async def test_a_refused_request_costs_no_attempt(
    tmp_path: Path, fields: dict[str, Any], error: type[MeshError], message: str
) -> None:
    async with service(tmp_path, writes("x")) as setup:
        caught = await error_of(setup.stub.GenerateStream(request(**fields)))
        assert type(caught) is error and str(caught) == message
        with pytest.raises(grpc.aio.AioRpcError, match=message):
            await setup.stub.Generate(request(**fields))
    assert setup.parts.admission.num_issued == 0


async def test_an_error_after_the_first_tokens_ends_the_stream_with_its_status(tmp_path: Path) -> None:
    def script(engine_request: EngineRequest) -> Iterable[Step]:
        return [Prefilled(0), Tokens(len(engine_request.resume_token_ids), (70,)), EngineFailed("nan")]

    async with service(tmp_path, script) as setup:
        received: list[str] = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for response in setup.stub.GenerateStream(request()):
                received.append(response.outputs.text)  # noqa: PERF401 - what came before the error is kept
    error = from_rpc_error(caught.value)
    assert isinstance(error, InternalError) and str(error) == "the request failed repeatedly: nan"
    assert len(received) == 3, "one token of each attempt"


async def test_an_overloaded_router_names_the_time_to_try_again(tmp_path: Path) -> None:
    config = RouterConfig(max_waiting_requests=1)
    async with service(tmp_path, writes("x"), config=config) as setup:
        error = await error_of(setup.stub.GenerateStream(request(sampling={"num_sequences": 2})))
    assert isinstance(error, Overloaded) and error.retry_after_s == 1.0


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_cancelled_call_aborts_the_request(tmp_path: Path, method: str) -> None:
    def script(engine_request: EngineRequest) -> Iterable[Step]:
        return [Prefilled(0), Tokens(0, (70,)), asyncio.Event()]

    async with service(tmp_path, script) as setup:
        counters, call = setup.parts.pipeline.counters["m"], getattr(setup.stub, method)(request())
        await until(lambda: counters.output_tokens == 1)
        call.cancel()
        await until(lambda: counters.num_aborted == 1)
        assert setup.parts.attempts.num_running == setup.parts.admission.num_unreturned == 0


async def test_tokenize_and_detokenize_are_inverse(tmp_path: Path) -> None:
    async with service(tmp_path, writes("x")) as setup:
        tokenized = await setup.stub.Tokenize(inference_pb2.TokenizeRequest(model="m", text="héllo"))
        assert tuple(tokenized.token_ids) == tokens_of("héllo")
        assert (tokenized.num_tokens, tokenized.max_model_len) == (6, 100)
        assert len(tokenized.token_texts) == len(tokenized.token_bytes) == 0
        request = inference_pb2.DetokenizeRequest(model="m", token_ids=tokenized.token_ids)
        assert (await setup.stub.Detokenize(request)).text == "héllo"
    assert setup.parts.attempts.requests == []


async def test_tokenize_returns_text_and_bytes_of_each_token_on_request(tmp_path: Path) -> None:
    async with service(tmp_path, writes("x")) as setup:
        tokenized = await setup.stub.Tokenize(inference_pb2.TokenizeRequest(text="é", token_texts=True))
    assert list(tokenized.token_bytes) == [b"\xc3", b"\xa9"]
    assert list(tokenized.token_texts) == ["\ufffd", "\ufffd"]


async def test_a_text_that_is_longer_than_the_context_is_tokenized(tmp_path: Path) -> None:
    async with service(tmp_path, writes("x")) as setup:
        tokenized = await setup.stub.Tokenize(inference_pb2.TokenizeRequest(text="x" * 65_536))
    assert tokenized.num_tokens == len(tokenized.token_ids) == 65_536 > tokenized.max_model_len


async def test_a_conversation_has_the_tokens_that_generate_computes(tmp_path: Path) -> None:
    chat = inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(role="user", content="hi")])
    async with service(tmp_path, writes("x")) as setup:
        tokenized = await setup.stub.Tokenize(inference_pb2.TokenizeRequest(chat=chat))
        await setup.stream(inference_pb2.GenerateRequest(chat=chat))
    assert tuple(tokenized.token_ids) == setup.parts.attempts.requests[0].prompt_token_ids


async def test_the_text_of_a_special_token_is_left_out_on_request(tmp_path: Path) -> None:
    async with service(tmp_path, writes("x")) as setup:
        for skip, text in ((False, "<|start|>a"), (True, "a")):
            request = inference_pb2.DetokenizeRequest(token_ids=[1, *tokens_of("a")], skip_special_tokens=skip)
            assert (await setup.stub.Detokenize(request)).text == text


@pytest.mark.parametrize(
    ("method", "fields", "error", "message"),
    [
        ("Tokenize", {"model": "x", "text": "a"}, ModelNotFound, "model: 'x' is not served; served: m"),
        ("Tokenize", {"text": "x" * 1_048_577}, InvalidRequest, "text: is 1048577 bytes; at most 1048576"),
        ("Tokenize", {"text": "x" * 65_537}, InvalidRequest, "text: is 65537 tokens; at most 65536 are listed"),
        ("Tokenize", {}, InvalidRequest, "text: exactly one of text, chat is needed; none is set"),
        ("Detokenize", {"token_ids": [5, 259]}, InvalidRequest, "token_ids[1]: token id 259 is unknown; m has 259"),
        ("Detokenize", {"token_ids": [5] * 101}, InvalidRequest, "token_ids: has 101 entries; at most 100"),
        ("Detokenize", {"model": "x"}, ModelNotFound, "model: 'x' is not served; served: m"),
    ],
)
async def test_what_cannot_be_tokenized_is_refused_by_the_name_of_its_field(
    tmp_path: Path, method: str, fields: dict[str, Any], error: type[MeshError], message: str
) -> None:
    kind = getattr(inference_pb2, f"{method}Request")
    async with service(tmp_path, writes("x")) as setup:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(setup.stub, method)(kind(**fields))
    received = from_rpc_error(caught.value)
    assert type(received) is error and str(received).startswith(message)


async def test_log_probabilities_of_a_long_prompt_are_all_reported(tmp_path: Path) -> None:
    """They are converted in a thread."""
    num_tokens = 1000
    logprobs = tuple(TokenLogprobs(Candidate(40, -0.5, 2), (Candidate(41, -0.25, 1),)) for _ in range(num_tokens - 1))
    message = request(text="x" * num_tokens, response={"prompt_logprobs": True, "prompt_candidates": {"top_n": 1}})
    script = writes("a", prefilled=Prefilled(0, logprobs))
    async with service(tmp_path, script, served_model(max_model_len=2000)) as setup:
        first, *_ = await setup.stream(message)
    info = first.prompt_info
    assert len(info.logprobs) == len(info.ranks) == len(info.token_texts) == num_tokens
    assert [one.tokens[0].id for one in info.candidate_tokens[1:]] == [41] * (num_tokens - 1)
