"""Connections that send arbitrary HTTP/2 frames, and bytes that are none."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.v1 import inference_pb2
from tests.support import http2
from tests.support.fuzzed_router import FuzzedRouter, fuzzed_router
from tests.support.fuzzing import fuzz

STREAM = "/muxmesh.v1.Inference/GenerateStream"
REQUEST = inference_pb2.GenerateRequest(model="m", text="hello").SerializeToString()
streams = st.sampled_from([0, 1, 2, 3, 5, 7, (1 << 31) - 1])
any_frames = st.builds(
    http2.frame, st.integers(0, 255) | st.integers(0, 10), st.integers(0, 255), streams, st.binary(max_size=60)
)
settings = st.builds(
    lambda pairs: http2.frame(http2.SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in pairs)),
    st.lists(
        st.tuples(st.integers(0, 8), st.sampled_from([0, 1, 16_384, 65_535, (1 << 31) - 1, (1 << 32) - 1])), max_size=4
    ),
)
updates = st.builds(
    lambda stream, size: http2.frame(http2.WINDOW_UPDATE, 0, stream, struct.pack(">I", size)),
    streams,
    st.sampled_from([0, 1, 65_535, (1 << 31) - 1, (1 << 32) - 1]),
)
calls = st.builds(
    http2.call,
    streams,
    st.sampled_from([STREAM, "/muxmesh.v1.Inference/Generate", "/grpc.health.v1.Health/Check", "/none/None", ""]),
    st.lists(
        st.sampled_from([("grpc-timeout", "1m"), ("grpc-encoding", "gzip"), ("x-request-id", "a"), ("te", "x")]),
        max_size=3,
    ),
)
sent = st.builds(http2.message, streams, st.just(REQUEST) | st.binary(max_size=50), st.none() | st.integers(0, 100))
resets = st.builds(
    lambda stream, code: http2.frame(http2.RST_STREAM, 0, stream, struct.pack(">I", code)), streams, st.integers(0, 20)
)
requests = st.builds(lambda stream: http2.call(stream, STREAM) + http2.message(stream, REQUEST), streams)
frames = any_frames | settings | updates | calls | sent | resets | requests


@pytest.fixture(scope="module")
def router() -> Iterator[FuzzedRouter]:
    with fuzzed_router() as router:
        yield router
        router.check_tasks()


def send(address: str, data: bytes) -> None:
    """Sends everything, ends the client's half of the connection, and reads until the server has ended its own."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65_536):
                pass
        except (ConnectionResetError, BrokenPipeError):
            pass  # the server may end the connection first


@fuzz(quick=200, part=0.05)
@given(
    start=st.sampled_from([http2.hello(), http2.hello(), http2.hello(0), http2.PREFACE, b""]) | st.binary(max_size=30),
    parts=st.lists(frames | st.binary(max_size=20), max_size=12),
)
def test_a_connection_that_sends_any_frames_does_no_harm(
    router: FuzzedRouter, start: bytes, parts: list[bytes]
) -> None:
    send(router.address, start + b"".join(parts))
    router.generate()
    router.check()
