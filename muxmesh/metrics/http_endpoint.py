"""A small HTTP server on the event loop of a process, for scrapers and probes.

It serves GET of the paths that it is given, one request for each connection, and bounds what clients cost: connections,
bytes of a request, and seconds until a request has arrived and its response is read. That it responds at all shows that
the event loop does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from errno import EADDRINUSE, EEXIST
from http import HTTPStatus
from pathlib import Path

import h11

from muxmesh.errors import ConfigError
from muxmesh.metrics.address import UNIX, host_and_port
from muxmesh.quoting import named

_log = logging.getLogger(__name__)

TEXT = "text/plain; charset=utf-8"
_READ_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Response:
    """The status and the body of a response."""

    status: HTTPStatus
    body: str | bytes
    content_type: str = TEXT


@dataclass(frozen=True, slots=True)
class EndpointLimits:
    """What clients may cost."""

    max_connections: int = 16
    """A further one ends the oldest, so that slow clients do not keep out a probe."""
    max_request_bytes: int = 8192
    request_s: float = 5.0
    """Until a request has arrived."""
    response_s: float = 10.0
    """Until the client has read the response."""


Route = Callable[[], Awaitable[Response]]


@dataclass(slots=True)
class HttpEndpoint:
    """Serves ``routes``, by path, until `close`."""

    routes: Mapping[str, Route]
    limits: EndpointLimits = EndpointLimits()
    address: str = ""
    """Where it listens, with the port that port 0 became."""
    _server: asyncio.Server | None = None
    _connections: dict[asyncio.Task[None], None] = field(default_factory=dict)
    """In the order in which they were opened."""

    async def start(self, address: str) -> None:
        """Listens on ``address``, HOST:PORT or unix:PATH. Raises ConfigError if it is invalid or in use."""
        try:
            if address.startswith(UNIX):
                path = Path(address.removeprefix(UNIX))
                _remove_stale_socket(path)
                self._server = await asyncio.start_unix_server(self._on_connection, path)
                self.address = address
                return
            host, port = host_and_port(address)
            self._server = await asyncio.start_server(self._on_connection, host, port, reuse_address=True)
        except (OSError, OverflowError, UnicodeError) as error:
            code = getattr(error, "errno", None) or 0  # negative for what the resolver reports
            reason = os.strerror(code) if code > 0 else error
            raise ConfigError(f"metrics cannot listen on {named(address)}: {reason}") from error
        bound = self._server.sockets[0].getsockname()[1]
        self.address = f"{address.rpartition(':')[0]}:{bound}"

    @property
    def num_connections(self) -> int:
        """Open connections."""
        return len(self._connections)

    async def close(self) -> None:
        """Closes the socket and all connections."""
        if self._server is None:
            return
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        if self.address.startswith(UNIX):
            Path(self.address.removeprefix(UNIX)).unlink(missing_ok=True)

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= self.limits.max_connections:
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.cancel()
        task = asyncio.create_task(self._serve(reader, writer), name="metrics connection")
        self._connections[task] = None
        task.add_done_callback(lambda done: self._connections.pop(done, None))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one request. A client that is too slow, or that goes away, is dropped."""
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=self.limits.max_request_bytes)
        try:
            async with asyncio.timeout(self.limits.request_s):
                response = await self._response(connection, reader)
            async with asyncio.timeout(self.limits.response_s):
                writer.write(_encoded(connection, response))
                writer.write_eof()
                while await reader.read(_READ_BYTES):  # what is unread at the end would reset the connection
                    pass
        except (TimeoutError, OSError, h11.ProtocolError):
            pass
        finally:
            writer.transport.abort()

    async def _response(self, connection: h11.Connection, reader: asyncio.StreamReader) -> Response:
        """Reads the head of a request; its body is not read. Raises OSError if the client goes away before."""
        try:
            while (event := connection.next_event()) is h11.NEED_DATA:
                if not (received := await reader.read(_READ_BYTES)):
                    raise ConnectionResetError
                connection.receive_data(received)
        except h11.RemoteProtocolError as error:
            return Response(HTTPStatus(error.error_status_hint), f"{error}\n")
        if not isinstance(event, h11.Request):
            raise ConnectionResetError
        if event.method != b"GET":
            return Response(
                HTTPStatus.METHOD_NOT_ALLOWED, "" if event.method == b"HEAD" else "the method must be GET\n"
            )
        route = self.routes.get(event.target.partition(b"?")[0].decode("ascii"))
        if route is None:
            return Response(HTTPStatus.NOT_FOUND, f"not found; this serves {', '.join(self.routes)}\n")
        return await _routed(route)


async def _routed(route: Route) -> Response:
    """The response of a route. An error of it, which is a bug, is logged and becomes status 500."""
    routed = asyncio.ensure_future(route())
    try:
        await asyncio.wait({routed})
    finally:
        routed.cancel()
    if (error := routed.exception()) is not None:
        _log.error("bug: a metrics route failed", exc_info=error)
        return Response(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; see the log\n")
    return routed.result()


def _encoded(connection: h11.Connection, response: Response) -> bytes:
    body = response.body.encode() if isinstance(response.body, str) else response.body
    headers = [
        ("Content-Type", response.content_type),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
    ]
    if response.status is HTTPStatus.METHOD_NOT_ALLOWED:
        headers.append(("Allow", "GET"))
    head = h11.Response(status_code=response.status, headers=headers, reason=response.status.phrase.encode())
    return (connection.send(head) or b"") + (connection.send(h11.Data(data=body)) or b"")


def _remove_stale_socket(path: Path) -> None:
    """Removes the socket that a killed process left. Raises OSError if a process listens on it, or it is no socket."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(EEXIST, "a file that is no socket is there")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
    raise OSError(EADDRINUSE, "in use")
