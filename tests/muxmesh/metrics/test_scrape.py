import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path

import pytest

from muxmesh.errors import Unavailable
from muxmesh.metrics.http_endpoint import HttpEndpoint, Response
from muxmesh.metrics.scrape import fetch


async def ready() -> Response:
    return Response(HTTPStatus.SERVICE_UNAVAILABLE, "not ready: starting\n")


async def large() -> Response:
    return Response(HTTPStatus.OK, b"x" * 1_000_000)


async def never() -> Response:
    await asyncio.Event().wait()
    raise AssertionError


@asynccontextmanager
async def answering(path: Path, answer: bytes) -> AsyncIterator[str]:
    """A process that sends ``answer`` to whatever it is sent, and closes the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_unix_server(serve, path)
    yield f"unix:{path}"
    server.close()


@asynccontextmanager
async def endpoint(path: Path, route: Callable[[], Awaitable[Response]]) -> AsyncIterator[str]:
    served = HttpEndpoint({"/x": route})
    await served.start(f"unix:{path}")
    yield served.address
    await served.close()


async def test_status_and_body_are_read(tmp_path: Path) -> None:
    async with endpoint(tmp_path / "s", ready) as address:
        assert await fetch(address, "/x", 20.0) == (503, b"not ready: starting\n")
    async with endpoint(tmp_path / "l", large) as address:
        assert await fetch(address, "/x", 20.0) == (200, b"x" * 1_000_000)


async def test_a_port_is_read_as_well() -> None:
    served = HttpEndpoint({"/x": ready})
    await served.start("127.0.0.1:0")
    assert (await fetch(served.address, "/x", 20.0))[0] == 503
    await served.close()


async def test_a_process_that_hangs_is_unavailable(tmp_path: Path) -> None:
    async with endpoint(tmp_path / "s", never) as address:
        with pytest.raises(Unavailable, match=r"did not respond within 0\.05 s"):
            await fetch(address, "/x", 0.05)


async def test_a_process_that_is_gone_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="No such file"):
        await fetch(f"unix:{tmp_path}/s", "/x", 20.0)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\x00\x01garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (16 * 1024 * 1024 + 1),
    ],
)
async def test_what_is_no_response_is_unavailable(tmp_path: Path, answer: bytes) -> None:
    async with answering(tmp_path / "s", answer) as address:
        with pytest.raises(Unavailable, match="cannot be read"):
            await fetch(address, "/x", 20.0)
