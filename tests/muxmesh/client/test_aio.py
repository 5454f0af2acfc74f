import asyncio
import dataclasses
import math
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from muxmesh import errors
from muxmesh.client import (
    NO_RETRIES,
    Candidate,
    Completion,
    Delta,
    Finish,
    MeshClient,
    PromptFacts,
    Retries,
    Scheduling,
    Timings,
    TokenLogprobs,
)
from muxmesh.errors import InternalError, InvalidRequest, MeshError, RequestAborted, Unavailable
from muxmesh.execution import Execution, PreemptionReason
from muxmesh.types import Waits
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
    async with MeshClient(mesh.address, retries=NO_RETRIES) as connected:
        yield connected


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
        await client.generate("x", model="m", num_sequences=2)  # type: ignore[call-arg]


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
    best, second = Candidate(97, -0.25, 1, "é", "é".encode()), Candidate(98, -1.0, 2, "\ufffd", b"\xc3")
    third = Candidate(99, -1.5, 3, " c", b" c")
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
    target.token_texts.append(chosen.text)
    target.token_bytes.append(chosen.token_bytes)
    candidates = target.candidate_tokens.add()
    for one in others:
        candidates.tokens.add(
            id=one.token_id, logprob=one.logprob, rank=one.rank, text=one.text, token_bytes=one.token_bytes
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
    expected = Scheduling("srtf", "because", 40.0, 90.0, "hint", 0.5, 1.5, 0.25, 7, 3, Waits(1.0, 2.0, 3.0, 4.0, 5.0))
    fields = [field.name for field in inference_pb2.SchedulingInfo.DESCRIPTOR.fields]
    (response,) = output("a")
    values = dataclasses.asdict(expected)
    response.scheduling.CopyFrom(inference_pb2.SchedulingInfo(**{name: values[name] for name in fields}))
    mesh.script = [response]
    assert (await client.generate("x", model="m", explain_scheduling=True)).prompt.scheduling == expected


async def test_what_became_of_a_request_reaches_the_client_without_reasons_that_it_does_not_know(
    mesh: FakeMesh, client: MeshClient
) -> None:
    expected = Execution({PreemptionReason.SLO: 3}, 1, 2, 4.0, 5.0, 6.0, 7.0, is_overdue=True)
    (response,) = mesh.script = output("a")
    response.execution.CopyFrom(inference_pb2.ExecutionInfo(**dataclasses.asdict(expected)))
    response.execution.preemptions["a new reason"] = 1
    assert (await client.generate("x", model="m", explain_scheduling=True)).execution == expected
    response.ClearField("execution")
    assert (await client.generate("x", model="m")).execution is None


# --- requests ---


async def test_prompt_and_options_reach_the_mesh(mesh: FakeMesh, client: MeshClient) -> None:
    await client.generate([{"role": "user", "content": "hi"}], model="m", seed=5, stop_strings="end")
    (request,) = mesh.requests
    assert request == inference_pb2.GenerateRequest(
        model="m",
        chat=inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(role="user", content="hi")]),
        sampling=inference_pb2.SamplingOptions(seed=5),
        stopping=inference_pb2.StoppingOptions(stop_strings=["end"]),
        response=inference_pb2.ResponseOptions(output_token_ids=True),
    )


async def test_what_cannot_be_sent_is_refused_before_the_stream_is_read() -> None:
    async with MeshClient(UNREACHABLE) as unconnected:
        with pytest.raises(InvalidRequest, match=r"^seed: is -1; "):
            unconnected.stream("x", seed=-1)
        with pytest.raises(InvalidRequest, match=r"^prompt: is None; "):
            unconnected.stream(None)  # type: ignore[arg-type]
        with pytest.raises(
            TypeError, match=r"'max_tokens' is not an option of a request; did you mean 'max_new_tokens'\?"
        ):
            unconnected.stream("x", max_tokens=5)  # type: ignore[call-arg]


@pytest.mark.parametrize("seconds", [0, -1, math.inf, math.nan, "5", True])
async def test_a_time_limit_that_is_none_is_refused_by_its_name(seconds: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"^connect_timeout_s: is {seconds!r}; a finite number of seconds"):
        MeshClient(UNREACHABLE, connect_timeout_s=seconds)
    async with MeshClient(UNREACHABLE) as unconnected:
        for call in (
            unconnected.generate("x", timeout_s=seconds),
            unconnected.list_models(seconds),
            unconnected.status(seconds),
        ):
            with pytest.raises(InvalidRequest, match=rf"^timeout_s: is {seconds!r}; a finite number of seconds"):
                await call


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


async def test_a_request_without_a_model_leaves_the_choice_to_the_mesh(mesh: FakeMesh, client: MeshClient) -> None:
    assert (await client.generate("x")).text == "abc"
    assert [request.model for request in mesh.requests] == [""] and mesh.num_list_calls == 0


async def test_a_mesh_of_several_models_names_them_to_a_request_without_one(mesh: FakeMesh, client: MeshClient) -> None:
    mesh.models = ["a", "b"]
    with pytest.raises(InvalidRequest, match=r"^model: .*one of: a, b$"):
        await client.generate("x")


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


# --- retries ---

AT_ONCE = Retries(max_retries=3, initial_delay_s=0.0)


@pytest.fixture
async def patient(mesh: FakeMesh) -> AsyncIterator[MeshClient]:
    """A client that repeats a failed call up to three times, without a wait."""
    async with MeshClient(mesh.address, retries=AT_ONCE) as connected:
        yield connected


@pytest.mark.parametrize("error", [grpc.StatusCode.UNAVAILABLE, errors.WorkerLost("decode/m died")])
async def test_a_request_that_fails_before_its_first_token_is_sent_again(
    mesh: FakeMesh, patient: MeshClient, error: Any
) -> None:
    mesh.scripts = [[error], [error]]
    assert (await patient.generate("x", model="m")).text == "abc"
    assert len(mesh.requests) == 3


async def test_the_number_of_retries_is_bounded(mesh: FakeMesh, patient: MeshClient) -> None:
    mesh.script = [grpc.StatusCode.UNAVAILABLE]
    with pytest.raises(Unavailable):
        await patient.generate("x", model="m")
    assert len(mesh.requests) == 4
    mesh.unary_error = errors.Unavailable("no unit")
    with pytest.raises(Unavailable):
        await patient.list_models()
    assert mesh.num_list_calls == 4


async def test_a_request_is_never_sent_again_after_its_first_token(mesh: FakeMesh, patient: MeshClient) -> None:
    mesh.script = [*output("ab")[:1], grpc.StatusCode.UNAVAILABLE]
    with pytest.raises(Unavailable):
        await patient.generate("x", model="m")
    assert len(mesh.requests) == 1


@pytest.mark.parametrize(
    "error", [InvalidRequest("text", "is empty"), errors.Overloaded("full", 0.0), InternalError("")]
)
async def test_a_request_that_the_mesh_refuses_is_not_sent_again(
    mesh: FakeMesh, patient: MeshClient, error: MeshError
) -> None:
    mesh.script = [error]
    with pytest.raises(type(error)):
        await patient.generate("x", model="m")
    assert len(mesh.requests) == 1


async def test_an_overloaded_mesh_is_asked_again_on_request(mesh: FakeMesh) -> None:
    mesh.scripts = [[errors.Overloaded("full", 0.0)]]
    async with MeshClient(mesh.address, retries=Retries(initial_delay_s=0.0, on_overload=True)) as client:
        assert (await client.generate("x", model="m")).text == "abc"
    assert len(mesh.requests) == 2


async def test_no_retry_is_begun_that_would_end_after_the_deadline(mesh: FakeMesh) -> None:
    mesh.script = [errors.Overloaded("full", 3600.0)]
    async with MeshClient(mesh.address, retries=Retries(on_overload=True)) as client:
        with pytest.raises(errors.Overloaded, match="full"):
            await client.generate("x", model="m", timeout_s=1800)
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
        mesh_pb2.ModelInfo(name="a", engine="sim", vocab_size=259, has_chat_template=True),
        mesh_pb2.ModelInfo(name="b", engine="sim", vocab_size=259, has_chat_template=True),
    ]


async def test_status_returns_the_message_of_the_mesh(mesh: FakeMesh, client: MeshClient) -> None:
    mesh.status.units.add(unit="unit0", connected=True)
    assert await client.status() == mesh.status
