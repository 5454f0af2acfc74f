import asyncio
import math
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from muxmesh import errors
from muxmesh.client import (
    Candidate,
    Completion,
    Delta,
    Finish,
    MeshClient,
    PromptFacts,
    Scheduling,
    Timings,
    TokenLogprobs,
)
from muxmesh.client import Message as Turn
from muxmesh.errors import InternalError, InvalidRequest, MeshError, ModelNotFound, RequestAborted, Unavailable
from muxmesh.v1 import inference_pb2, mesh_pb2
from tests.support.fake_mesh import FakeMesh, fake_mesh, output

UNREACHABLE = "127.0.0.1:1"
TIMINGS = Timings(queue_s=0.25, ttft_s=0.5, e2e_s=1.5, num_restarts=2, router_s=0.125)
FACTS = PromptFacts(num_tokens=3, num_cached_tokens=0, seed=7)


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[FakeMesh]:
    async with fake_mesh(tmp_path) as fake:
        yield fake


@pytest.fixture
async def client(mesh: FakeMesh) -> AsyncIterator[MeshClient]:
    async with MeshClient(mesh.address) as connected:
        yield connected


async def sent(mesh: FakeMesh, client: MeshClient, prompt: Any = "x", **options: Any) -> inference_pb2.GenerateRequest:
    """The request message that `MeshClient.stream` sends for these arguments."""
    assert [delta async for delta in client.stream(prompt, **{"model": "m", **options})]
    return mesh.requests[-1]


# --- outputs ---


async def test_generate_joins_the_deltas_of_one_output(client: MeshClient) -> None:
    assert await client.generate("x", model="m") == Completion(
        text="abc", token_ids=(97, 98, 99), prompt=FACTS, finish=Finish("length", 3), timings=TIMINGS
    )


async def test_prompt_facts_come_in_the_first_delta_and_finish_and_timings_in_the_last(client: MeshClient) -> None:
    assert [delta async for delta in client.stream("x", model="m")] == [
        Delta(0, "a", (97,), 1, prompt=FACTS),
        Delta(0, "b", (98,), 1),
        Delta(0, "c", (99,), 1, finish=Finish("length", 3), timings=TIMINGS),
    ]


async def test_a_delta_is_yielded_before_the_next_one_is_generated(mesh: FakeMesh, client: MeshClient) -> None:
    first, *rest = output("abc")
    proceed = asyncio.Event()
    mesh.script = [first, proceed, *rest]
    stream = client.stream("x", model="m")
    assert (await anext(stream)).text == "a"
    proceed.set()
    assert [delta.text async for delta in stream] == ["b", "c"]


async def test_generate_many_returns_the_sequences_in_order_of_their_index(mesh: FakeMesh, client: MeshClient) -> None:
    responses = output("abc", "z", "xy")
    assert [response.outputs.index for response in responses] == [0, 1, 2, 0, 2, 0]
    head, tail = responses[0], responses[-1]
    head.outputs.index, responses[2].outputs.index = 2, 0  # the sequences begin in another order
    responses[3].outputs.index, responses[4].outputs.index, tail.outputs.index = 2, 0, 2
    mesh.script = responses
    completions = await client.generate_many("x", model="m", num_sequences=3)
    assert [completion.text for completion in completions] == ["xy", "z", "abc"]
    assert [completion.finish.num_output_tokens for completion in completions] == [2, 1, 3]
    assert all(completion.prompt == FACTS and completion.timings == TIMINGS for completion in completions)


async def test_generate_refuses_several_sequences(client: MeshClient) -> None:
    with pytest.raises(InvalidRequest, match=r"^num_sequences: .*generate_many"):
        await client.generate("x", model="m", num_sequences=2)


async def test_streams_of_one_client_run_side_by_side(mesh: FakeMesh, client: MeshClient) -> None:
    first, *rest = output("abc")
    proceed = asyncio.Event()
    mesh.script = [first, proceed, *rest]
    streams = [client.stream(f"prompt {number}", model="m") for number in range(8)]
    assert [(await anext(stream)).text for stream in streams] == ["a"] * 8
    proceed.set()
    for stream in reversed(streams):
        assert [delta.text async for delta in stream] == ["b", "c"]
    assert {request.text for request in mesh.requests} == {f"prompt {number}" for number in range(8)}


@pytest.mark.parametrize(
    ("fields", "finish"),
    [
        ({"finish_reason": 1}, Finish("length", 2)),
        ({"finish_reason": 2, "stop_token_id": 0}, Finish("stop", 2, 0)),
        ({"finish_reason": 2, "eos_token_id": 5}, Finish("stop", 2, 5)),
        ({"finish_reason": 2, "stop_string": "end"}, Finish("stop", 2, "end")),
        ({"finish_reason": 3}, Finish("aborted", 2)),
    ],
)
async def test_a_finish_names_its_reason_and_what_stopped_the_output(
    mesh: FakeMesh, client: MeshClient, fields: dict[str, Any], finish: Finish
) -> None:
    mesh.script = output("ab", **fields)
    assert (await client.generate("x", model="m")).finish == finish


@pytest.mark.parametrize("number", [0, 9])
async def test_an_unknown_finish_reason_is_an_internal_error(mesh: FakeMesh, client: MeshClient, number: int) -> None:
    mesh.script = output("ab", finish_reason=number)
    with pytest.raises(InternalError, match=f"finish_reason {number}"):
        await client.generate("x", model="m")


def without(response: inference_pb2.GenerateResponse, *paths: str) -> inference_pb2.GenerateResponse:
    for path in paths:
        part: Any = response.outputs if path == "finish_info" else response
        part.ClearField(path)
    return response


@pytest.mark.parametrize(
    "script",
    [
        output("ab")[:1],
        [without(output("a")[0], "prompt_info")],
        [without(output("a")[0], "finish_info")],
        [*output("ab", "z")[:2], without(output("ab")[1], "finish_info")],
    ],
    ids=["no last message", "no prompt", "no finish", "one sequence without a finish"],
)
async def test_a_stream_that_ends_too_early_is_an_internal_error(
    mesh: FakeMesh, client: MeshClient, script: Sequence[inference_pb2.GenerateResponse]
) -> None:
    mesh.script = script
    with pytest.raises(InternalError, match="without a finish"):
        await client.generate_many("x", model="m")


async def test_log_probabilities_of_prompt_and_output_are_values(mesh: FakeMesh, client: MeshClient) -> None:
    best, second, third = Candidate(97, -0.25, 1), Candidate(98, -1.0, 2), Candidate(99, -1.5, 3)
    responses = output("abc")
    prompt = responses[0].prompt_info
    prompt.token_ids.extend([3, 4])
    add_logprobs(prompt, Candidate(3, 0.0, 0))
    add_logprobs(prompt, Candidate(4, -0.5, 1))
    add_logprobs(responses[0].outputs, best, second)
    add_logprobs(responses[1].outputs, second, best)
    add_logprobs(responses[2].outputs, third, best, second)
    mesh.script = responses
    completion = await client.generate("x", model="m", logprobs=2, prompt_logprobs=0)
    assert completion.prompt.logprobs == (TokenLogprobs(Candidate(4, -0.5, 1)),)
    assert completion.logprobs == tuple(TokenLogprobs(chosen, (best, second)) for chosen in (best, second, third))


async def test_a_token_as_likely_as_a_candidate_has_its_own_index_among_them(
    mesh: FakeMesh, client: MeshClient
) -> None:
    (response,) = output("a")
    add_logprobs(response.outputs, Candidate(97, -0.5, 1), Candidate(96, -0.5, 1))
    mesh.script = [response]
    completion = await client.generate("x", model="m", logprobs=2)
    assert completion.logprobs == (
        TokenLogprobs(Candidate(97, -0.5, 1), (Candidate(96, -0.5, 1), Candidate(97, -0.5, 2))),
    )


def add_logprobs(target: Any, chosen: Candidate, *others: Candidate) -> None:
    """Appends one position to the columns of a message."""
    target.logprobs.append(chosen.logprob)
    target.ranks.append(chosen.rank)
    target.candidate_tokens.add(
        tokens=[{"id": one.token_id, "logprob": one.logprob, "rank": one.rank} for one in others]
    )


async def test_prompt_facts_keep_a_prediction_of_zero_apart_from_no_prediction(
    mesh: FakeMesh, client: MeshClient
) -> None:
    assert (await client.generate("x", model="m")).prompt.predicted_output_tokens is None
    (response,) = output("a")
    response.prompt_info.predicted_output_tokens = 0
    response.prompt_info.num_cached_tokens = 2
    mesh.script = [response]
    assert (await client.generate("x", model="m")).prompt == PromptFacts(3, 2, 7, predicted_output_tokens=0)


async def test_every_field_of_the_scheduling_info_reaches_the_client(mesh: FakeMesh, client: MeshClient) -> None:
    expected = Scheduling("srtf", "because", 40.0, 90.0, "hint", 0.5, 1.5, 0.25, 7, 3)
    fields = [field.name for field in inference_pb2.SchedulingInfo.DESCRIPTOR.fields]
    (response,) = output("a")
    response.scheduling.CopyFrom(inference_pb2.SchedulingInfo(**{name: getattr(expected, name) for name in fields}))
    mesh.script = [response]
    assert (await client.generate("x", model="m", explain_scheduling=True)).prompt.scheduling == expected


# --- requests ---


async def test_a_request_without_options_leaves_optional_fields_unset(mesh: FakeMesh, client: MeshClient) -> None:
    expected = inference_pb2.GenerateRequest(
        model="m",
        text="x",
        sampling=inference_pb2.SamplingOptions(num_sequences=1),
        decoding=inference_pb2.DecodingOptions(),
        stopping=inference_pb2.StoppingOptions(),
        response=inference_pb2.ResponseOptions(output_token_ids=True, skip_special_tokens=True),
        kv=inference_pb2.KvOptions(),
    )
    assert await sent(mesh, client) == expected


async def test_every_option_has_its_field_in_the_request(mesh: FakeMesh, client: MeshClient) -> None:
    request = await sent(
        mesh, client, max_new_tokens=5, min_new_tokens=2, temperature=0.5, top_k=4, top_p=0.75, min_p=0.25,
        presence_penalty=0.5, frequency_penalty=-0.5, repetition_penalty=1.5, logit_bias={3: -1.0},
        allowed_token_ids=[3, 4], seed=(1 << 63) - 1, num_sequences=2, stop_strings=["a", "b"], stop_token_ids=[6],
        include_stop_strings=True, ignore_eos=True, truncate_prompt_tokens=8, skip_special_tokens=False, logprobs=0,
        prompt_logprobs=1, cache_salt="s", bypass_prefix_cache=True, kv_swap_format="int8", priority=-3,
        expected_output_tokens=9, explain_scheduling=True, request_id="r",
    )  # fmt: skip
    assert request == inference_pb2.GenerateRequest(
        request_id="r",
        model="m",
        text="x",
        temperature=0.5,
        sampling=inference_pb2.SamplingOptions(num_sequences=2, top_k=4, top_p=0.75, min_p=0.25, seed=(1 << 63) - 1),
        decoding=inference_pb2.DecodingOptions(
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            repetition_penalty=1.5,
            logit_bias={3: -1.0},
            allowed_token_ids=[3, 4],
        ),
        stopping=inference_pb2.StoppingOptions(
            max_new_tokens=5,
            min_new_tokens=2,
            stop_token_ids=[6],
            stop_strings=["a", "b"],
            include_stop_strings=True,
            ignore_eos=True,
        ),
        response=inference_pb2.ResponseOptions(
            output_token_ids=True,
            prompt_token_ids=True,
            skip_special_tokens=False,
            output_logprobs=True,
            prompt_logprobs=True,
            prompt_candidates=inference_pb2.CandidateTokens(top_n=1),
            scheduling=True,
        ),
        kv=inference_pb2.KvOptions(
            cache_salt="s", bypass_prefix_cache=True, swap_format=inference_pb2.KV_SWAP_FORMAT_INT8
        ),
        truncate_prompt_tokens=8,
        priority=-3,
        expected_output_tokens=9,
    )
    assert set(unset_fields(request)) == {"token_ids", "chat", "session_id", "output_candidates", "output_text"}


def unset_fields(message: Message) -> Iterator[str]:
    """A field that is new in the proto appears here until the client has an option for it."""
    present = {field.name: value for field, value in message.ListFields()}
    for field in message.DESCRIPTOR.fields:
        if field.name not in present:
            yield field.name
        elif isinstance(present[field.name], Message):
            yield from unset_fields(present[field.name])


@pytest.mark.parametrize(
    ("prompt", "fields"),
    [
        ("", {"text": ""}),
        ("text", {"text": "text"}),
        ([5, 6], {"token_ids": {"ids": [5, 6]}}),
        ((), {"token_ids": {}}),
        (range(2), {"token_ids": {"ids": [0, 1]}}),
        ([Turn("user", "hi")], {"chat": {"messages": [{"role": "user", "content": "hi"}]}}),
    ],
)
async def test_a_prompt_is_sent_in_the_field_of_its_kind(
    mesh: FakeMesh, client: MeshClient, prompt: Any, fields: dict[str, Any]
) -> None:
    request: Message = await sent(mesh, client, prompt)
    for field in request.DESCRIPTOR.fields:
        if field.name not in ("text", "token_ids", "chat"):
            request.ClearField(field.name)
    assert request == inference_pb2.GenerateRequest(**fields)


@pytest.mark.parametrize(
    ("stop", "expected"), [("end", ["end"]), (["a", "b"], ["a", "b"]), ((), [])], ids=["text", "list", "none"]
)
async def test_one_stop_string_needs_no_list(
    mesh: FakeMesh, client: MeshClient, stop: str | list[str], expected: list[str]
) -> None:
    assert list((await sent(mesh, client, stop_strings=stop)).stopping.stop_strings) == expected


@pytest.mark.parametrize(("kv_format", "number"), [(None, 0), ("raw", 1), ("int8", 2)])
async def test_the_swap_format_is_sent_by_its_number(
    mesh: FakeMesh, client: MeshClient, kv_format: Any, number: int
) -> None:
    assert (await sent(mesh, client, kv_swap_format=kv_format)).kv.swap_format == number


async def test_an_empty_list_of_allowed_tokens_is_refused_since_on_the_wire_it_would_allow_all() -> None:
    async with MeshClient(UNREACHABLE) as unconnected:
        with pytest.raises(InvalidRequest, match=r"^allowed_token_ids: is empty.*None allows all"):
            await unconnected.generate("x", model="m", allowed_token_ids=[])


@pytest.mark.parametrize(
    ("prompt", "field", "problem"),
    [
        (b"text", "prompt", "is bytes"),
        (bytearray(b"text"), "prompt", "is bytes"),
        ([1, "a"], "prompt", "neither text"),
        ([1, Turn("user", "x")], "prompt", "neither text"),
        ([1.5], "prompt", "neither text"),
        ([-1], "request", "-1"),
        ([1 << 32], "request", str(1 << 32)),
        (None, "request", "NoneType"),
        ("\ud800", "request", "surrogates"),
        ([Turn("user", 5)], "request", "bad argument type"),  # type: ignore[arg-type]
    ],
)
async def test_a_prompt_that_cannot_be_sent_is_refused(prompt: Any, field: str, problem: str) -> None:
    async with MeshClient(UNREACHABLE) as unconnected:
        with pytest.raises(InvalidRequest, match=problem) as caught:
            await unconnected.generate(prompt, model="m")
    assert caught.value.field == field


UINT32 = ("max_new_tokens", "min_new_tokens", "top_k", "logprobs", "prompt_logprobs", "truncate_prompt_tokens")
BOUNDS: list[tuple[str, int, int]] = [
    *((name, 0, (1 << 32) - 1) for name in UINT32),
    ("num_sequences", 1, (1 << 32) - 1),
    ("expected_output_tokens", 1, (1 << 32) - 1),
    ("seed", 0, (1 << 63) - 1),
    ("priority", -(1 << 31), (1 << 31) - 1),
]


@pytest.mark.parametrize(("name", "least", "most"), BOUNDS)
async def test_a_number_outside_its_bounds_is_refused_by_its_name(name: str, least: int, most: int) -> None:
    async with MeshClient(UNREACHABLE) as unconnected:
        for value in (least - 1, most + 1, 1.5, "1"):
            with pytest.raises(InvalidRequest) as caught:
                await unconnected.generate_many("x", model="m", **{name: value})
            assert caught.value.field == name
            assert caught.value.problem == f"is {value!r}; a whole number from {least} to {most}"


@pytest.mark.parametrize(("name", "least", "most"), BOUNDS)
async def test_a_number_at_its_bounds_is_sent(
    mesh: FakeMesh, client: MeshClient, name: str, least: int, most: int
) -> None:
    for value in (least, most):
        await sent(mesh, client, **{name: value})


@pytest.mark.parametrize("name", ["allowed_token_ids", "stop_token_ids"])
@pytest.mark.parametrize("token_id", [-1, 1 << 32, "a"])
async def test_a_token_id_that_is_none_is_refused_by_the_name_of_its_list(name: str, token_id: Any) -> None:
    async with MeshClient(UNREACHABLE) as unconnected:
        with pytest.raises(InvalidRequest, match=f"^{name}: is "):
            await unconnected.generate("x", model="m", **{name: [3, token_id]})


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"kv_swap_format": "int4"}, "kv_swap_format"),
        ({"temperature": "hot"}, "request"),
        ({"logit_bias": {-1: 1.0}}, "request"),
        ({"cache_salt": "\ud800"}, "request"),
        ({"timeout_s": math.inf}, "timeout_s"),
        ({"timeout_s": math.nan}, "timeout_s"),
    ],
)
async def test_a_value_that_cannot_be_sent_is_refused(options: dict[str, Any], field: str) -> None:
    async with MeshClient(UNREACHABLE) as unconnected:
        with pytest.raises(InvalidRequest) as caught:
            await unconnected.generate("x", model="m", **options)
    assert caught.value.field == field


async def test_stream_request_sends_the_message_as_it_is(mesh: FakeMesh, client: MeshClient) -> None:
    request = inference_pb2.GenerateRequest(model="m", session_id="s")
    responses = [response async for response in client.stream_request(request)]
    assert responses == list(output("abc"))
    assert mesh.requests == [request]


async def test_messages_above_the_default_limit_of_grpc_are_sent_and_received(
    mesh: FakeMesh, client: MeshClient
) -> None:
    text = "x" * (5 << 20)
    (response,) = output("a")
    response.outputs.text = text
    mesh.script = [response]
    assert (await client.generate(text, model="m")).text == text
    assert mesh.requests[0].text == text


# --- the default model ---


async def test_the_only_model_is_looked_up_once(mesh: FakeMesh, client: MeshClient) -> None:
    for _ in range(3):
        await client.generate("x")
    assert [request.model for request in mesh.requests] == ["m"] * 3
    assert mesh.num_list_calls == 1


async def test_a_named_model_needs_no_lookup(mesh: FakeMesh, client: MeshClient) -> None:
    await client.generate("x", model="m")
    assert mesh.num_list_calls == 0


@pytest.mark.parametrize(("models", "problem"), [([], "serves no model"), (["a", "b"], "choose one of a, b")])
async def test_a_request_without_a_model_is_refused_unless_the_mesh_serves_exactly_one(
    mesh: FakeMesh, client: MeshClient, models: list[str], problem: str
) -> None:
    mesh.models = models
    with pytest.raises(InvalidRequest, match=f"^model: .*{problem}"):
        await client.generate("x")
    assert mesh.requests == []


async def test_the_default_model_is_looked_up_again_after_it_was_not_found(mesh: FakeMesh, client: MeshClient) -> None:
    await client.generate("x")
    mesh.models = ["other"]
    with pytest.raises(ModelNotFound, match="'m'"):
        await client.generate("x")
    await client.generate("x")
    assert [request.model for request in mesh.requests] == ["m", "m", "other"]


# --- deadlines ---


async def test_the_deadline_travels_with_the_call(mesh: FakeMesh, client: MeshClient) -> None:
    await client.generate("x", timeout_s=3600)
    await client.generate("x")
    with_deadline_s, without_deadline_s = mesh.deadlines_s
    assert with_deadline_s is not None and with_deadline_s == pytest.approx(3600, rel=0.05)
    assert without_deadline_s is None


async def test_a_passed_deadline_raises_and_ends_the_call_on_the_server(mesh: FakeMesh, client: MeshClient) -> None:
    mesh.script = [*output("ab")[:1], asyncio.Event()]
    task = asyncio.create_task(client.generate("x", model="m", timeout_s=1.0))
    await mesh.until(lambda mesh: len(mesh.requests) == 1)
    with pytest.raises(errors.DeadlineExceeded):
        await asyncio.wait_for(task, 20)
    await mesh.until(lambda mesh: mesh.num_ended == 1)


# --- errors ---

RAISED: list[MeshError] = [
    errors.InvalidRequest("stopping.max_new_tokens", "is 0; at least 1"),
    errors.ModelNotFound("model: 'x' is not served"),
    errors.Overloaded("40 requests wait", 2.5),
    errors.DeadlineExceeded("too late"),
    errors.RequestAborted("aborted"),
    errors.RequestPreempted("pre-empted"),
    errors.WorkerLost("decode/m died"),
    errors.Unavailable("no unit"),
    errors.EngineFailed("a step raised"),
    errors.Unauthenticated("no key"),
    errors.InternalError("a bug"),
]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
async def test_an_error_of_the_mesh_is_raised_as_the_same_error(
    mesh: FakeMesh, client: MeshClient, error: MeshError
) -> None:
    mesh.script = [error]
    mesh.unary_error = error
    with pytest.raises(MeshError) as streamed:
        await client.generate("x", model="m")
    with pytest.raises(MeshError) as listed:
        await client.list_models()
    with pytest.raises(MeshError) as fetched:
        await client.status()
    for caught in (streamed, listed, fetched):
        assert type(caught.value) is type(error)
        assert vars(caught.value) == vars(error)
        assert str(caught.value) == str(error)


async def test_an_error_after_the_first_delta_is_raised_after_that_delta(mesh: FakeMesh, client: MeshClient) -> None:
    mesh.script = [*output("ab")[:1], errors.WorkerLost("decode/m died")]
    stream = client.stream("x", model="m")
    assert (await anext(stream)).text == "a"
    with pytest.raises(errors.WorkerLost):
        await anext(stream)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.Overloaded),
        (grpc.StatusCode.CANCELLED, errors.RequestAborted),
        (grpc.StatusCode.DATA_LOSS, errors.InternalError),
    ],
)
async def test_a_bare_status_of_a_proxy_is_the_nearest_error(
    mesh: FakeMesh, client: MeshClient, code: grpc.StatusCode, error: type[MeshError]
) -> None:
    mesh.script = [code]
    with pytest.raises(error, match=f"status {code.name}"):
        await client.generate("x", model="m")


async def test_an_unreachable_mesh_is_unavailable_to_every_call() -> None:
    async with MeshClient(UNREACHABLE) as unconnected:
        for call in (unconnected.generate("x", model="m"), unconnected.list_models(), unconnected.status()):
            with pytest.raises(Unavailable):
                await call


async def test_a_failed_request_is_not_sent_again(mesh: FakeMesh, client: MeshClient) -> None:
    mesh.script = [grpc.StatusCode.UNAVAILABLE]
    with pytest.raises(Unavailable):
        await client.generate("x", model="m")
    assert len(mesh.requests) == 1


# --- cancel and close ---


async def test_closing_a_stream_aborts_the_request(mesh: FakeMesh, client: MeshClient) -> None:
    mesh.script = [*output("ab")[:1], asyncio.Event()]
    stream = client.stream("x", model="m")
    await anext(stream)
    await stream.aclose()
    await mesh.until(lambda mesh: mesh.num_ended == 1)
    assert await anext(stream, None) is None


async def test_cancelling_the_task_aborts_the_request(mesh: FakeMesh, client: MeshClient) -> None:
    mesh.script = [asyncio.Event()]
    task = asyncio.create_task(client.generate("x", model="m"))
    await mesh.until(lambda mesh: len(mesh.requests) == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await mesh.until(lambda mesh: mesh.num_ended == 1)


async def test_a_timeout_of_the_caller_is_a_timeout_not_an_error_of_the_mesh(
    mesh: FakeMesh, client: MeshClient
) -> None:
    mesh.script = [asyncio.Event()]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await client.generate("x", model="m")


async def test_closing_the_client_aborts_the_requests_in_progress(mesh: FakeMesh, client: MeshClient) -> None:
    mesh.script = [asyncio.Event()]
    task = asyncio.create_task(client.generate("x", model="m"))
    await mesh.until(lambda mesh: len(mesh.requests) == 1)
    await client.close()
    with pytest.raises(RequestAborted, match="the client was closed"):
        await task
    await mesh.until(lambda mesh: mesh.num_ended == 1)


async def test_a_task_that_is_cancelled_while_the_client_closes_stays_cancelled(
    mesh: FakeMesh, client: MeshClient
) -> None:
    mesh.script = [asyncio.Event()]
    task = asyncio.create_task(client.generate("x", model="m"))
    await mesh.until(lambda mesh: len(mesh.requests) == 1)
    task.cancel()
    await client.close()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_closed_client_refuses_every_call(mesh: FakeMesh, client: MeshClient) -> None:
    await client.close()
    await client.close()
    for call in (client.generate("x", model="m"), client.generate("x"), client.list_models(), client.status()):
        with pytest.raises(RequestAborted, match="the client is closed"):
            await call
    assert mesh.requests == []


# --- several addresses ---


async def test_requests_are_spread_over_several_addresses() -> None:
    async with fake_mesh("127.0.0.1:0") as one, fake_mesh("127.0.0.1:0") as other:
        ports = [mesh.address.rpartition(":")[2] for mesh in (one, other)]
        async with MeshClient("ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)) as both:
            async with asyncio.timeout(20):
                while not (one.requests and other.requests):  # an address is used once it is connected
                    await both.generate("x", model="m")
            before = len(one.requests), len(other.requests)
            for _ in range(10):
                await both.generate("x", model="m")
            assert (len(one.requests) - before[0], len(other.requests) - before[1]) == (5, 5)


async def test_an_address_that_cannot_be_reached_gets_no_request() -> None:
    async with fake_mesh("127.0.0.1:0") as mesh:
        port = mesh.address.rpartition(":")[2]
        async with MeshClient(f"ipv4:{UNREACHABLE},127.0.0.1:{port}") as client:
            for _ in range(4):
                await client.generate("x", model="m")
        assert len(mesh.requests) == 4


# --- models and status ---


async def test_list_models_returns_the_messages_of_the_mesh(mesh: FakeMesh, client: MeshClient) -> None:
    mesh.models = ["a", "b"]
    assert await client.list_models() == [
        mesh_pb2.ModelInfo(name="a", engine="sim", vocab_size=259),
        mesh_pb2.ModelInfo(name="b", engine="sim", vocab_size=259),
    ]


async def test_status_returns_the_message_of_the_mesh(mesh: FakeMesh, client: MeshClient) -> None:
    mesh.status.units.add(unit="unit0", connected=True)
    assert await client.status() == mesh.status
