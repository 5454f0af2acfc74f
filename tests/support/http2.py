"""HTTP/2 frames as bytes, for clients that do what no gRPC library does. RFC 9113 and 7541; headers are literal."""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
INITIAL_WINDOW_SIZE = 4
INITIAL_WINDOW = 65_535
MAX_FRAME = 16_384


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def hello(window: int = INITIAL_WINDOW) -> bytes:
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
    parts = [data[start : start + MAX_FRAME] for start in range(0, len(data), MAX_FRAME)]
    last = len(parts) - 1 if size == len(raw) else len(parts)
    return b"".join(frame(DATA, END_STREAM if index == last else 0, stream, part) for index, part in enumerate(parts))


def _literal(text: str) -> bytes:
    """A literal header name that is not indexed. Without its first byte, a value."""
    return b"\0" + bytes([len(text)]) + text.encode()


class Connection:
    """A connection that keeps to the windows of its server: its `send` waits until the server takes more."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._unparsed = b""
        self._initial_window = INITIAL_WINDOW
        self._granted: Counter[int] = Counter()
        """By stream, 0 for the connection: bytes that the server takes beyond the initial window, less those sent."""
        self.received = b""
        """Payloads of the frames that carry headers or data."""

    @classmethod
    async def open(cls, address: str, window: int = INITIAL_WINDOW) -> Connection:
        """Connects, and accepts ``window`` bytes on each stream."""
        connection = cls(*await connect(address))
        connection._writer.write(hello(window))
        return connection

    async def send(self, stream: int, path: str, raw: bytes, announced: int | None = None) -> None:
        """Calls ``path`` with one message, or with its beginning if more is announced."""
        self._writer.write(call(stream, path))
        size = len(raw) if announced is None else announced
        data, start = b"\0" + struct.pack(">I", size) + raw, 0
        while start < len(data):
            while (window := self._window(stream)) <= 0:
                await self._read()
            part = data[start : start + window]
            start += len(part)
            is_last = start == len(data) and size == len(raw)
            self._writer.write(frame(DATA, END_STREAM if is_last else 0, stream, part))
            await self._writer.drain()
            for one in (0, stream):
                self._granted[one] -= len(part)

    async def until(self, expected: bytes) -> bytes:
        """What the server has sent when ``expected`` is a part of it."""
        while expected not in self.received:
            await self._read()
        return self.received

    def close(self) -> None:
        self._writer.close()

    async def _read(self) -> None:
        data = await self._reader.read(65_536)
        if not data:
            raise ConnectionError(f"the server closed the connection after {self.received!r}")
        self._unparsed += data
        while len(self._unparsed) >= (size := 9 + int.from_bytes(self._unparsed[:3], "big")):
            kind, stream = self._unparsed[3], int.from_bytes(self._unparsed[5:9], "big")
            payload, self._unparsed = self._unparsed[9:size], self._unparsed[size:]
            if kind == WINDOW_UPDATE:
                self._granted[stream] += int.from_bytes(payload, "big")
            elif kind in (HEADERS, DATA):
                self.received += payload
            elif kind in (RST_STREAM, GOAWAY):
                raise ConnectionError(f"the server ended stream {stream} with {payload!r}")
            elif kind == SETTINGS:
                for number, value in struct.iter_unpack(">HI", payload):
                    if number == INITIAL_WINDOW_SIZE:
                        self._initial_window = value

    def _window(self, stream: int) -> int:
        return min(INITIAL_WINDOW + self._granted[0], self._initial_window + self._granted[stream], MAX_FRAME)


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
