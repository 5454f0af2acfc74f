import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path

import pytest

from muxmesh.errors import ConfigError
from muxmesh.metrics.http_endpoint import EndpointLimits, HttpEndpoint, Response

LARGE = 32 * 1024 * 1024
"""Bytes of a response that no kernel holds for a client that does not read."""


async def hello() -> Response:
    return Response(HTTPStatus.OK, "hello\n")


async def large() -> Response:
    return Response(HTTPStatus.OK, b"x" * LARGE)


async def broken() -> Response:
    raise ValueError("a bug in a route")


@asynccontextmanager
async def endpoint(limits: EndpointLimits | None = None) -> AsyncIterator[HttpEndpoint]:
    served = HttpEndpoint({"/hello": hello, "/large": large, "/broken": broken}, limits or EndpointLimits())
    await served.start("127.0.0.1:0")
    try:
        yield served
    finally:
        await served.close()


async def opened(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.startswith("unix:"):
        return await asyncio.open_unix_connection(address.removeprefix("unix:"))
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def sent(address: str, request: bytes) -> bytes:
    """What the endpoint sends until it closes the connection."""
    reader, writer = await opened(address)
    try:
        writer.write(request)
        async with asyncio.timeout(20):
            return await reader.read()
    finally:
        writer.close()


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


async def test_a_path_is_served_and_the_connection_closed() -> None:
    async with endpoint() as served:
        assert await sent(served.address, get("/hello")) == (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 6\r\n"
            b"Connection: close\r\n\r\nhello\n"
        )


async def test_a_query_is_ignored() -> None:
    async with endpoint() as served:
        assert (await sent(served.address, get("/hello?a=/large"))).endswith(b"\r\n\r\nhello\n")


async def test_a_client_of_http_1_0_is_served() -> None:
    async with endpoint() as served:
        assert (await sent(served.address, b"GET /hello HTTP/1.0\r\n\r\n")).endswith(b"\r\n\r\nhello\n")


async def test_other_paths_are_not_found() -> None:
    async with endpoint() as served:
        response = await sent(served.address, get("/hello/../etc"))
    assert response.startswith(b"HTTP/1.1 404 Not Found\r\n")
    assert response.endswith(b"\r\n\r\nnot found; this serves /hello, /large, /broken\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "CONNECT", "NONSENSE"])
async def test_other_methods_are_refused(method: str) -> None:
    async with endpoint() as served:
        response = await sent(served.address, f"{method} /hello HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert response.startswith(b"HTTP/1.1 405 Method Not Allowed\r\n")
    assert b"\r\nAllow: GET\r\n" in response


@pytest.mark.parametrize(
    "request_bytes", [b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET /hello HTTP/1.1\r\n\r\n", b"GET\r\n\r\n"]
)
async def test_what_is_no_request_is_refused(request_bytes: bytes) -> None:
    async with endpoint() as served:
        assert (await sent(served.address, request_bytes)).startswith(b"HTTP/1.1 400 Bad Request\r\n")


async def test_a_large_request_is_refused() -> None:
    async with endpoint() as served:
        response = await sent(served.address, b"GET /hello HTTP/1.1\r\nHost: x\r\nCookie: " + b"c" * 20_000)
    assert response.startswith(b"HTTP/1.1 431 ")


async def test_the_body_of_a_request_is_not_read() -> None:
    async with endpoint() as served:
        request = b"GET /hello HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
        assert (await sent(served.address, request + b"b" * 100_000)).endswith(b"\r\n\r\nhello\n")


async def test_a_request_that_does_not_arrive_in_time_ends_its_connection() -> None:
    async with endpoint(EndpointLimits(request_s=0.05)) as served:
        assert await sent(served.address, b"GET /hello HTTP/1.1\r\n") == b""


async def test_a_client_that_does_not_read_its_response_is_dropped() -> None:
    async with endpoint(EndpointLimits(response_s=0.05)) as served:
        reader, writer = await opened(served.address)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(get("/large"))
        async with asyncio.timeout(20):
            while not served.num_connections:
                await asyncio.sleep(0)
            while served.num_connections:
                await asyncio.sleep(0)
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert len(await reader.read()) < LARGE
        writer.close()


async def test_slow_clients_do_not_keep_out_others() -> None:
    async with endpoint(EndpointLimits(max_connections=3)) as served:
        slow = [await opened(served.address) for _ in range(20)]
        assert (await sent(served.address, get("/hello"))).endswith(b"hello\n")
        assert served.num_connections <= 3
        for reader, _ in slow[:17]:
            assert await reader.read() == b""
        for _, writer in slow:
            writer.close()


async def test_an_error_of_a_route_is_status_500_and_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with endpoint() as served:
        response = await sent(served.address, get("/broken"))
        assert response.startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
        assert b"a bug" not in response
        assert (await sent(served.address, get("/hello"))).endswith(b"hello\n")
    assert "a bug in a route" in caplog.text


async def test_a_socket_of_a_process_that_was_killed_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "m.http"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    served = HttpEndpoint({"/hello": hello})
    await served.start(f"unix:{path}")
    assert (await sent(f"unix:{path}", get("/hello"))).endswith(b"hello\n")
    await served.close()
    assert not path.exists()


async def test_a_socket_of_a_running_process_is_left_alone(tmp_path: Path) -> None:
    first, second = HttpEndpoint({"/hello": hello}), HttpEndpoint({})
    address = f"unix:{tmp_path / 'm.http'}"
    await first.start(address)
    with pytest.raises(ConfigError, match=r"metrics cannot listen on unix:.*: Address already in use"):
        await second.start(address)
    assert (await sent(address, get("/hello"))).endswith(b"hello\n")
    await first.close()


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "m.http").write_text("mine")
    with pytest.raises(ConfigError, match="File exists"):
        await HttpEndpoint({}).start(f"unix:{tmp_path / 'm.http'}")
    assert (tmp_path / "m.http").read_text() == "mine"


async def test_a_port_in_use_is_one_line() -> None:
    async with endpoint() as served:
        with pytest.raises(ConfigError) as caught:
            await HttpEndpoint({}).start(served.address)
    assert str(caught.value) == f"metrics cannot listen on {served.address}: Address already in use"


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("", "must be HOST:PORT"),
        ("9464", "must be HOST:PORT"),
        (":9464", "must be HOST:PORT"),
        ("localhost:", "must be HOST:PORT"),
        ("::1:9464", "must be HOST:PORT"),
        ("localhost:-1", "must be HOST:PORT"),
        ("localhost:65536", "larger than 65535"),
        ("localhost:" + "9" * 5000, "larger than 65535"),
        ("no.such.host.invalid:9464", "cannot listen on no.such.host.invalid:9464: "),
        ("a\nb:9464", "cannot listen on"),
        ("x" * 300 + ":9464", "cannot listen on"),
        ("unix:/nowhere/m.http", "No such file or directory"),
        ("unix:/tmp/" + "x" * 200, "too long"),
    ],
)
async def test_a_wrong_address_is_one_line(address: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        await HttpEndpoint({}).start(address)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 350


async def test_ipv6_is_served() -> None:
    served = HttpEndpoint({"/hello": hello})
    await served.start("[::1]:0")
    assert served.address.startswith("[::1]:")
    assert (await sent(served.address.replace("[::1]", "::1"), get("/hello"))).endswith(b"hello\n")
    await served.close()
