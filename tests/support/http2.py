"""HTTP/2 frames as bytes, for clients that do what no gRPC library does. RFC 9113 and 7541; headers are literal."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterable
from pathlib import Path

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
INITIAL_WINDOW_SIZE = 4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def hello(window: int = 65_535) -> bytes:
    """The beginning of a connection whose client accepts ``window`` bytes on each stream, until it says more."""
    return PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, window)) + frame(SETTINGS, ACK, 0)


def call(stream: int, path: str, extra: Iterable[tuple[str, str]] = ()) -> bytes:
    """The headers of a gRPC call."""
    fields = [
        (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "mesh"), ("te", "trailers"),
        ("content-type", "application/grpc"), *extra,
    ]  # fmt: skip
    return frame(HEADERS, END_HEADERS, stream, b"".join(_literal(name) + _literal(value)[1:] for name, value in fields))


def message(stream: int, raw: bytes, announced: int | None = None) -> bytes:
    """The frames of one gRPC message, and the end of the request if it is as long as it is ``announced``."""
    size = len(raw) if announced is None else announced
    data = b"\0" + struct.pack(">I", size) + raw
    parts = [data[start : start + 16_384] for start in range(0, len(data), 16_384)]
    last = len(parts) - 1 if size == len(raw) else len(parts)
    return b"".join(frame(DATA, END_STREAM if index == last else 0, stream, part) for index, part in enumerate(parts))


def _literal(text: str) -> bytes:
    """A literal header name that is not indexed. Without its first byte, a value."""
    return b"\0" + bytes([len(text)]) + text.encode()


async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Opens a plain connection to HOST:PORT or unix:PATH."""
    if address.startswith("unix:"):
        return await asyncio.open_unix_connection(Path(address.removeprefix("unix:")))
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def ends(reader: asyncio.StreamReader) -> bytes:
    """What the server sends until it closes the connection."""
    async with asyncio.timeout(20):
        received = b""
        while data := await reader.read(65_536):
            received += data
        return received


async def until(reader: asyncio.StreamReader, expected: bytes) -> bytes:
    """What the server sends until ``expected`` is a part of it."""
    async with asyncio.timeout(20):
        received = b""
        while expected not in received:
            data = await reader.read(65_536)
            assert data, f"the connection ended with {received!r}"
            received += data
        return received
