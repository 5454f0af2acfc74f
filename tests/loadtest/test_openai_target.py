"""The wire of the OpenAI target, against a server on the loopback interface."""

import json
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from loadtest.openai_target import OpenAiTarget
from loadtest.target import Piece, StreamEnd, TargetError
from loadtest.workload import PlannedRequest
from muxmesh.errors import Unavailable
from tests.support.loadtest_openai import DONE, ScriptedOpenAi, chunk, data, scripted_openai, usage

REQUEST = PlannedRequest(0, 0.0, (5, 6, 7), False, 3, True, 42, tenant="t", priority=2)
Stub = tuple[ScriptedOpenAi, OpenAiTarget]


@pytest_asyncio.fixture
async def stub() -> AsyncIterator[Stub]:
    async with scripted_openai() as (server, url):
        target = OpenAiTarget(f"{url}/v1/", range(10, 20), 0.5, 20.0)
        yield server, target
        await target.close()


async def events(target: OpenAiTarget, request: PlannedRequest = REQUEST) -> list[Piece | StreamEnd]:
    return [event async for event in target.stream(request)]


async def test_a_completion_yields_its_pieces_and_its_usage(stub: Stub) -> None:
    server, target = stub
    assert [model.name for model in await target.models()] == ["first", "second"]
    server.events = [chunk("a"), chunk("b", "length"), usage(3, 7), DONE]
    assert await events(target) == [Piece(1), Piece(1), StreamEnd(3, 7, "length")]
    ((path, body),) = server.bodies
    assert path == "/v1/completions"
    assert body == {
        "model": "first", "prompt": [5, 6, 7], "max_tokens": 3, "min_tokens": 3, "ignore_eos": True, "seed": 42,
        "temperature": 0.5, "user": "t", "cache_salt": "t", "priority": 2, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


async def test_a_chat_is_sent_as_messages_and_yields_its_pieces(stub: Stub) -> None:
    server, target = stub
    delta = {"choices": [{"delta": {"content": "hi"}, "finish_reason": "stop"}]}
    role = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
    server.events = [data(role), data(delta), usage(9, 1, prompt_tokens_details={"cached_tokens": 8}), DONE]
    request = replace(REQUEST, prompt="Hello", is_chat=True, model="second", is_forced=False, priority=0, tenant=None)
    assert await events(target, request) == [Piece(1), StreamEnd(9, 1, "stop", 8)]
    ((path, body),) = server.bodies
    assert (path, body["messages"]) == ("/v1/chat/completions", [{"role": "user", "content": "Hello"}])
    assert not {"min_tokens", "ignore_eos", "priority", "user", "cache_salt", "prompt"} & body.keys()
    assert body["model"] == "second"


async def test_the_server_s_own_temperature_is_the_default() -> None:
    async with scripted_openai() as (server, url):
        server.events = [chunk("a", "stop"), usage(1, 1)]
        target = OpenAiTarget(url, range(9), None, None)
        await events(target)
        await target.close()
        assert "temperature" not in server.bodies[0][1]


@pytest.mark.parametrize(
    ("choice", "pieces"),
    [
        ({"delta": {"role": "assistant"}}, 0),
        ({"delta": {"role": "assistant", "content": None}}, 0),
        ({"delta": {"role": "assistant", "content": "a"}}, 1),
        ({"delta": {"content": ""}}, 1),
        ({"delta": {"reasoning_content": "a"}, "finish_reason": "stop"}, 1),
        ({"delta": {"tool_calls": [{}]}}, 1),
        ({"delta": {}, "finish_reason": "stop"}, 0),
        ({"delta": {"content": "", "role": "assistant"}, "finish_reason": "stop"}, 0),
        ({"delta": {"content": "a"}, "finish_reason": "length"}, 1),
        ({"text": ""}, 1),
        ({"text": "", "finish_reason": "stop"}, 0),
        ({"text": "a", "finish_reason": "length"}, 1),
    ],
)
async def test_every_chunk_but_an_opening_and_an_ending_counts_as_a_token(
    stub: Stub, choice: dict[str, Any], pieces: int
) -> None:
    server, target = stub
    server.events = [data({"choices": [choice]}), chunk("z", "stop"), usage(1, 1)]
    assert (await events(target))[:-1] == [Piece(1)] * (pieces + 1)


@pytest.mark.parametrize(("owner", "takes"), [("vllm", True), ("sglang", False), (None, False)])
async def test_a_salt_is_for_servers_that_are_known_to_take_one(stub: Stub, owner: str | None, takes: bool) -> None:
    server, target = stub
    server.models = {"data": [{"id": "m"} if owner is None else {"id": "m", "owned_by": owner}]}
    assert [model.takes_cache_salt for model in await target.models()] == [takes]
    server.events = [chunk("a", "stop"), usage(1, 1)]
    await events(target, replace(REQUEST, cache_salt="s/t"))
    assert (server.bodies[0][1]["cache_salt"], server.bodies[0][1]["user"]) == ("s/t", "t")


async def test_comments_and_other_fields_of_the_event_stream_are_ignored(stub: Stub) -> None:
    server, target = stub
    server.events = [": ping\n\n", "event: message\n", chunk("a"), "retry: 5\n\n", chunk("b", "stop"), usage(1, 2)]
    assert await events(target) == [Piece(1), Piece(1), StreamEnd(1, 2, "stop")]


async def test_usage_may_come_with_the_last_chunk_and_without_a_done(stub: Stub) -> None:
    server, target = stub
    last = {"choices": [{"text": "a", "finish_reason": "stop"}], "usage": {"prompt_tokens": 4, "completion_tokens": 1}}
    server.events = [data(last)]
    assert await events(target) == [Piece(1), StreamEnd(4, 1, "stop")]


async def test_the_last_usage_counts(stub: Stub) -> None:
    server, target = stub
    server.events = [chunk("a"), usage(4, 1), chunk("b", "stop"), usage(4, 2, prompt_tokens_details=None)]
    assert (await events(target))[-1] == StreamEnd(4, 2, "stop", None)


async def test_a_chunk_after_the_finish_reason_keeps_it(stub: Stub) -> None:
    server, target = stub
    server.events = [chunk("a", "stop"), chunk(""), usage(4, 1)]
    assert (await events(target))[-1] == StreamEnd(4, 1, "stop")


async def test_events_after_the_done_are_ignored(stub: Stub) -> None:
    server, target = stub
    server.events = [chunk("a", "stop"), usage(1, 1), DONE, "data: {not json\n\n"]
    assert (await events(target))[-1] == StreamEnd(1, 1, "stop")


async def test_a_refusal_keeps_its_status_and_its_text(stub: Stub) -> None:
    server, target = stub
    server.status = 503
    with pytest.raises(TargetError, match="overloaded") as error:
        await events(target)
    assert (error.value.status, error.value.is_unreachable) == ("HTTP 503", False)


@pytest.mark.parametrize(
    ("script", "is_cut", "status"),
    [
        ([chunk("a")], True, "CONNECTION LOST"),
        ([chunk("a")], False, "CUT OFF"),
        ([chunk("a", "stop"), DONE], False, "CUT OFF"),
        ([chunk("a"), usage(1, 1), DONE], False, "CUT OFF"),
        ([chunk("a"), "data: {no json\n\n"], False, "BAD RESPONSE"),
        ([data([1])], False, "BAD RESPONSE"),
        ([data(5)], False, "BAD RESPONSE"),
        ([data({"choices": [5]})], False, "BAD RESPONSE"),
        ([chunk("a", "stop"), data({"choices": [], "usage": {"prompt_tokens": None}})], False, "BAD RESPONSE"),
        ([chunk("a"), data({"error": {"message": "out of memory"}})], False, "STREAM ERROR"),
    ],
)
async def test_a_stream_that_ends_badly_is_an_error(stub: Stub, script: list[str], is_cut: bool, status: str) -> None:
    server, target = stub
    server.events, server.is_cut = script, is_cut
    with pytest.raises(TargetError) as error:
        await events(target)
    assert error.value.status == status
    assert error.value.is_unreachable == (status == "CONNECTION LOST")


async def test_an_error_in_the_stream_keeps_its_message(stub: Stub) -> None:
    server, target = stub
    server.events = [data({"error": {"message": "out of memory"}})]
    with pytest.raises(TargetError, match=json.dumps({"message": "out of memory"})):
        await events(target)


@pytest.mark.parametrize(
    ("models", "status", "message"),
    [
        ({"data": []}, 200, "serves no model"),
        ({"models": []}, 200, "/v1/models returns no list of models: KeyError"),
        ({"data": [{"name": "a"}]}, 200, "returns no list of models"),
        ({"data": 5}, 200, "returns no list of models"),
        ([1], 200, "returns no list of models"),
        ({}, 500, "no OpenAI-compatible server answers at http://127.0.0.1:.*500"),
    ],
)
async def test_a_server_without_a_list_of_models_is_unavailable(
    stub: Stub, models: Any, status: int, message: str
) -> None:
    server, target = stub
    server.models, server.models_status = models, status
    with pytest.raises(Unavailable, match=message):
        await target.models()


async def test_the_reason_why_a_server_cannot_be_reached_is_named() -> None:
    with socket.socket() as bound:  # it does not listen
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        target = OpenAiTarget(url, range(9), None, None)
        with pytest.raises(Unavailable, match=f"answers at {url}: Connection refused$"):
            await target.models()
        await target.close()


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
async def test_the_url_may_end_in_v1(url: str) -> None:
    target = OpenAiTarget(url, range(9), None, None)
    assert target.name == "OpenAI API at http://h:1"
    await target.close()


async def test_the_vocabulary_is_the_given_one_for_every_model(stub: Stub) -> None:
    _, target = stub
    assert [model.vocabulary for model in await target.models()] == [range(10, 20)] * 2
