"""Reads an HTTP endpoint of another process of the mesh, within limits of time and size."""

from __future__ import annotations

import asyncio

import h11

from muxmesh.errors import Unavailable
from muxmesh.metrics.address import UNIX, host_and_port

_READ_BYTES = 64 * 1024
_MAX_BODY_BYTES = 16 * 1024 * 1024


async def fetch(address: str, path: str, timeout_s: float) -> tuple[int, bytes]:
    """Status and body of GET ``path`` at ``address``, HOST:PORT or unix:PATH.

    Raises Unavailable if the process does not respond within ``timeout_s``, or with what is no HTTP.
    """
    try:
        async with asyncio.timeout(timeout_s):
            if address.startswith(UNIX):
                reader, writer = await asyncio.open_unix_connection(address.removeprefix(UNIX))
            else:
                reader, writer = await asyncio.open_connection(*host_and_port(address))
            try:
                return await _exchange(reader, writer, path)
            finally:
                writer.transport.abort()
    except TimeoutError as error:
        raise Unavailable(f"{address} did not respond within {timeout_s:g} s") from error
    except (OSError, h11.RemoteProtocolError) as error:
        raise Unavailable(f"{address} cannot be read: {error}") from error


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> tuple[int, bytes]:
    connection = h11.Connection(h11.CLIENT)
    request = h11.Request(method="GET", target=path, headers=[("Host", "muxmesh"), ("Connection", "close")])
    writer.write((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
    status, body = 0, bytearray()
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > _MAX_BODY_BYTES:
                raise OSError(f"the response is longer than {_MAX_BODY_BYTES} bytes")
        elif isinstance(event, h11.ConnectionClosed):
            raise OSError("the connection was closed")
    return status, bytes(body)
