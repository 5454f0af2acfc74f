"""The contract of a target, which both kinds of server keep."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest
import pytest_asyncio

from loadtest.mesh_target import MeshTarget
from loadtest.openai_target import OpenAiTarget
from loadtest.target import Piece, StreamEnd, Target, TargetError
from loadtest.workload import PlannedRequest
from muxmesh.errors import Overloaded, Unavailable
from tests.support.fake_mesh import FakeMesh, fake_mesh, first, last, tokens
from tests.support.loadtest_openai import ScriptedOpenAi, chunk, scripted_openai, usage

REQUEST = PlannedRequest(0, 0.0, (5, 6, 7), False, 3, True, 42, "m")


class Server(Protocol):
    """A server that the tests can set up without knowing its wire."""

    def target(self, timeout_s: float = 20.0) -> Target: ...

    def absent(self) -> Target:
        """A target whose server does not exist."""

    def will_send(self, num_tokens: int) -> None:
        """Each request gets so many tokens, one by one, and ends."""

    def will_refuse(self) -> None: ...

    def will_hang(self) -> None:
        """Each request gets one token, and its stream stays open."""

    async def until_aborted(self) -> None:
        """Waits until the client has aborted a request that hangs."""


class MeshServer:
    def __init__(self, mesh: FakeMesh, folder: Path) -> None:
        self._mesh, self._folder = mesh, folder
        mesh.vocab_sizes["m"] = 800

    def target(self, timeout_s: float = 20.0) -> Target:
        return MeshTarget(self._mesh.address, None, timeout_s)

    def absent(self) -> Target:
        return MeshTarget(f"unix:{self._folder / 'none.sock'}", None, 20.0)

    def will_send(self, num_tokens: int) -> None:
        self._mesh.script = [first(3, 0), *(tokens(index) for index in range(num_tokens)), last(num_tokens)]

    def will_refuse(self) -> None:
        self._mesh.script = [Overloaded("overloaded")]

    def will_hang(self) -> None:
        self._mesh.script = [first(3, 0, (1,)), asyncio.Event()]

    async def until_aborted(self) -> None:
        await self._mesh.until(lambda mesh: mesh.num_ended == 1)


class OpenAiServer:
    def __init__(self, server: ScriptedOpenAi, url: str) -> None:
        self._server, self._url = server, url
        server.models = {"data": [{"id": "m"}]}

    def target(self, timeout_s: float = 20.0) -> Target:
        return OpenAiTarget(self._url, range(100, 600), None, timeout_s)

    def absent(self) -> Target:
        return OpenAiTarget("http://127.0.0.1:9", range(9), None, 20.0)

    def will_send(self, num_tokens: int) -> None:
        chunks = [chunk("x", "length" if index == num_tokens - 1 else None) for index in range(num_tokens)]
        self._server.events = [*chunks, usage(3, num_tokens)]

    def will_refuse(self) -> None:
        self._server.status = 429

    def will_hang(self) -> None:
        self._server.events, self._server.holds = [chunk("x")], True

    async def until_aborted(self) -> None:
        await self._server.aborted.wait()


@pytest_asyncio.fixture(params=["mesh", "openai"])
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Server]:
    if request.param == "mesh":
        async with fake_mesh(tmp_path) as mesh:
            yield MeshServer(mesh, tmp_path)
    else:
        async with scripted_openai() as (openai, url):
            yield OpenAiServer(openai, url)


@pytest_asyncio.fixture
async def target(server: Server) -> AsyncIterator[Target]:
    target = server.target()
    yield target
    await target.close()


async def test_the_served_models_are_listed_with_a_vocabulary(target: Target) -> None:
    (model,) = await target.models()
    assert (model.name, model.vocabulary) == ("m", range(100, 600))


@pytest.mark.parametrize("num_tokens", [1, 5])
async def test_a_stream_has_a_piece_for_each_message_and_then_one_end(
    server: Server, target: Target, num_tokens: int
) -> None:
    server.will_send(num_tokens)
    *pieces, end = [event async for event in target.stream(REQUEST)]
    assert pieces == [Piece(1)] * num_tokens
    assert isinstance(end, StreamEnd)
    assert (end.num_input, end.num_output, end.finish) == (3, num_tokens, "length")


async def test_many_streams_run_at_the_same_time(server: Server, target: Target) -> None:
    server.will_send(3)

    async def count(index: int) -> int:
        return len([event async for event in target.stream(replace(REQUEST, index=index))])

    assert await asyncio.gather(*map(count, range(20))) == [4] * 20


async def test_a_refusal_is_an_error_of_a_server_that_was_reached(server: Server, target: Target) -> None:
    server.will_refuse()
    with pytest.raises(TargetError, match="overloaded") as error:
        await anext(aiter(target.stream(REQUEST)))
    assert not error.value.is_unreachable


async def test_closing_a_stream_aborts_the_request_at_the_server(server: Server, target: Target) -> None:
    server.will_hang()
    async with aclosing(target.stream(REQUEST)) as events:  # type: ignore[type-var]  # every target has a generator
        assert await anext(events) == Piece(1)
    async with asyncio.timeout(30):
        await server.until_aborted()


async def test_a_stream_that_passes_its_deadline_is_an_error(server: Server) -> None:
    server.will_hang()
    target = server.target(timeout_s=0.05)
    with pytest.raises(TargetError) as error:
        async with asyncio.timeout(30):
            async for _ in target.stream(REQUEST):
                pass
    assert error.value.status in {"DEADLINE_EXCEEDED", "TIMEOUT"}
    assert not error.value.is_unreachable
    await target.close()


async def test_an_absent_server_is_unavailable_and_its_requests_are_unreachable(server: Server) -> None:
    target = server.absent()
    with pytest.raises(Unavailable, match=f"answers at {target.name.split(' at ')[1]}[: ]"):
        await target.models()
    with pytest.raises(TargetError) as error:
        await anext(aiter(target.stream(REQUEST)))
    assert error.value.is_unreachable
    await target.close()


async def test_the_name_has_the_kind_and_the_address(target: Target) -> None:
    kind, _, address = target.name.partition(" at ")
    assert kind in {"mesh", "OpenAI API"}
    assert address.startswith(("unix:", "http://127.0.0.1:"))
