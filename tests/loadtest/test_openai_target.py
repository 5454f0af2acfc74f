"""An OpenAI-compatible server as the driver sees it: a real one on loopback, which answers well and badly."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from loadtest.openai_target import OpenAiTarget
from loadtest.target import Ended, Piece, TargetError
from loadtest.workload import PlannedRequest
from muxmesh.errors import Unavailable

REQUEST = PlannedRequest(0, 0.0, (5, 6, 7), False, 3, True, 42, tenant="t", priority=2)


class StubServer:
    """Streams what it is told to; keeps the bodies that it got."""

    def __init__(self) -> None:
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.events: list[str] = []
        self.status = 200
        self.cut = False

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "first"}, {"id": "second"}]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append((request.path, await request.json()))
        if self.status != 200:
            return web.Response(status=self.status, text="no room")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in self.events:
            await response.write(f"data: {event}\n\n".encode())
        if self.cut:
            assert request.transport is not None
            request.transport.close()
        return response


@pytest_asyncio.fixture
async def stub() -> AsyncIterator[tuple[StubServer, OpenAiTarget]]:
    server = StubServer()
    app = web.Application()
    app.router.add_get("/v1/models", server.models)
    app.router.add_post("/v1/completions", server.complete)
    app.router.add_post("/v1/chat/completions", server.complete)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    (address,) = runner.addresses
    target = OpenAiTarget(f"http://127.0.0.1:{address[1]}/v1/", range(10, 20), 0.5, 20.0)
    yield server, target
    await target.close()
    await runner.cleanup()


def chunk(text: str, finish: str | None = None) -> str:
    return json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": finish}], "usage": None})


USAGE = json.dumps({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}})


async def ask(target: OpenAiTarget, request: PlannedRequest = REQUEST) -> list[Piece | Ended]:
    return [event async for event in target.ask(request)]


async def test_a_completion_with_its_usage(stub: tuple[StubServer, OpenAiTarget]) -> None:
    server, target = stub
    assert [model.name for model in await target.models()] == ["first", "second"]
    server.events = [chunk("a"), chunk("b", "length"), USAGE, "[DONE]"]
    assert await ask(target) == [Piece(1), Piece(1), Ended(3, 7, "length")]
    ((path, body),) = server.bodies
    assert path == "/v1/completions"
    assert body == {
        "model": "first", "prompt": [5, 6, 7], "max_tokens": 3, "min_tokens": 3, "ignore_eos": True, "seed": 42,
        "temperature": 0.5, "user": "t", "cache_salt": "t", "priority": 2, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


async def test_a_chat(stub: tuple[StubServer, OpenAiTarget]) -> None:
    server, target = stub
    delta = {"choices": [{"delta": {"content": "hi"}, "finish_reason": "stop"}]}
    role = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
    cached = {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 8}}
    server.events = [json.dumps(role), json.dumps(delta), json.dumps({"choices": [], "usage": cached}), "[DONE]"]
    request = replace(REQUEST, prompt="Hello", is_chat=True, model="second", is_forced=False, priority=0, tenant=None)
    assert await ask(target, request) == [Piece(1), Ended(9, 1, "stop", 8)]
    ((path, body),) = server.bodies
    assert (path, body["messages"]) == ("/v1/chat/completions", [{"role": "user", "content": "Hello"}])
    assert not {"min_tokens", "ignore_eos", "priority", "user"} & body.keys()
    assert body["model"] == "second"


async def test_a_refusal_keeps_its_status_and_words(stub: tuple[StubServer, OpenAiTarget]) -> None:
    server, target = stub
    server.status = 503
    with pytest.raises(TargetError, match="no room") as error:
        await ask(target)
    assert (error.value.status, error.value.is_unreachable) == ("HTTP 503", False)


@pytest.mark.parametrize(
    ("events", "cut", "status"),
    [
        ([chunk("a")], True, "CONNECTION LOST"),
        ([chunk("a")], False, "CUT OFF"),
        ([chunk("a", "stop"), "[DONE]"], False, "CUT OFF"),
        ([chunk("a"), "{no json"], False, "BAD ANSWER"),
        (["[1]"], False, "BAD ANSWER"),
        ([json.dumps({"choices": [5]})], False, "BAD ANSWER"),
        ([chunk("a", "stop"), json.dumps({"choices": [], "usage": {"prompt_tokens": None}})], False, "BAD ANSWER"),
        ([chunk("a"), json.dumps({"error": {"message": "out of memory"}})], False, "STREAM ERROR"),
    ],
)
async def test_a_stream_that_ends_badly_is_an_error(
    stub: tuple[StubServer, OpenAiTarget], events: list[str], cut: bool, status: str
) -> None:
    server, target = stub
    server.events, server.cut = events, cut
    with pytest.raises(TargetError) as error:
        await ask(target)
    assert error.value.status == status


async def test_nobody_there() -> None:
    target = OpenAiTarget("http://127.0.0.1:9", range(10), None, 5.0)
    with pytest.raises(Unavailable, match=r"no OpenAI-compatible server answers at http://127\.0\.0\.1:9"):
        await target.models()
    with pytest.raises(TargetError) as error:
        await ask(target)
    assert error.value.is_unreachable
    await target.close()
