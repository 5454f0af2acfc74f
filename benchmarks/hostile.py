"""How soon a small request is served beside clients that send or hold as much as they may, and the router's memory.

Each attack runs against a fresh mesh. The clients are raw sockets on this host, so they share an address, and every
limit, with the small request. That goes to a model with the sim engine, which computes in no time, because the time in
the router is measured; prompts go to the real model and its tokenizer.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from benchmarks.mesh_process import UpProcess, peak_mb, up
from benchmarks.report import Report
from muxmesh.errors import MeshError
from muxmesh.v1 import inference_pb2
from tests.support import http2
from tests.support.protobuf_wire import delimited

STREAM = "/muxmesh.v1.Inference/GenerateStream"
MIB = 1024 * 1024
SECONDS = 6.0
INTERVAL_S = 0.05
MAX_REQUEST_S = 0.5
MAX_ROUTER_MB = 400
NUM_HALF_OPEN, NUM_GIANTS, NUM_SOCKETS, NUM_UNREAD = 24, 30, 1100, 2000
STREAMS_OF_A_CONNECTION = 100
REAL, SIM, BUSY = "smollm2-135m-instruct", "sim", "busy"
MESH = f"""
units:
  - models:
      - name: {REAL}
      - {{name: {SIM}, engine: sim}}
      - {{name: {BUSY}, engine: sim, sim: {{base_s: 0.002}}}}
"""
Attack = Callable[[UpProcess], AbstractAsyncContextManager[None]]


def request(model: str, text: str) -> bytes:
    """A request for a long output."""
    stopping = inference_pb2.StoppingOptions(max_new_tokens=1000, ignore_eos=True)
    return inference_pb2.GenerateRequest(model=model, text=text, stopping=stopping).SerializeToString()


async def largest_message(mesh: UpProcess) -> int:
    """Bytes of the largest message that the router takes, as it reports them."""
    reader, writer = await http2.connect(mesh.address)
    writer.write(http2.hello() + http2.call(1, STREAM) + http2.message(1, bytes(16), announced=1 << 30))
    refusal = await http2.until(reader, b"larger than max")
    writer.close()
    return int(refusal.split(b" vs. ")[1].split(b")")[0])


def largest_messages(size: int) -> list[bytes]:
    """The largest message, filled in the ways that cost most to read."""
    empty_turn, unknown, number = b"\x0a\x00", b"\xf8\x07\x01", b"\x60\x01"
    half = size - 16
    turns = empty_turn * (half // 2)
    return [
        delimited(100, turns),
        unknown * (half // 3),
        number * (half // 2),
        delimited(4, delimited(1, b"\x01" * (half - 8))),
        delimited(2, b"x" * half),
        request(REAL, "x" * (half - 64)),
    ]


@asynccontextmanager
async def nothing(mesh: UpProcess) -> AsyncIterator[None]:
    """No attack."""
    yield


@asynccontextmanager
async def sending_the_largest(mesh: UpProcess) -> AsyncIterator[None]:
    """One connection after the other sends the largest message, each time filled in another way."""
    messages = largest_messages(await largest_message(mesh))

    async def send() -> None:
        while True:
            for raw in messages:
                connection = await http2.Connection.open(mesh.address)
                await connection.send(1, STREAM, raw)
                await connection.until(b"grpc-status")
                connection.close()

    task = asyncio.create_task(send())
    try:
        yield
        if task.done():
            task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def half_open(mesh: UpProcess) -> AsyncIterator[None]:
    """Messages that stop one byte before their end."""
    size = await largest_message(mesh)
    connections = [await http2.Connection.open(mesh.address) for _ in range(NUM_HALF_OPEN)]
    half = bytes(size - 1)
    await asyncio.gather(*(connection.send(1, STREAM, half, announced=size) for connection in connections))
    yield
    for connection in connections:
        connection.close()


@asynccontextmanager
async def giant_prompts(mesh: UpProcess) -> AsyncIterator[None]:
    """Prompts of digits: each is a token, so they are too long for the context."""
    raw = request(REAL, "1234567890" * (MIB // 10))
    connections = [await http2.Connection.open(mesh.address) for _ in range(NUM_GIANTS)]

    async def refused(connection: http2.Connection) -> None:
        await connection.send(1, STREAM, raw)
        assert b"more than" in await connection.until(b"grpc-status")
        connection.close()

    tasks = [asyncio.create_task(refused(connection)) for connection in connections]
    yield
    await asyncio.gather(*tasks)


@asynccontextmanager
async def idle_sockets(mesh: UpProcess) -> AsyncIterator[None]:
    """Sockets that send nothing."""
    connections = [await http2.connect(mesh.address) for _ in range(NUM_SOCKETS)]
    yield
    for _, writer in connections:
        writer.close()


@asynccontextmanager
async def unread_streams(mesh: UpProcess) -> AsyncIterator[None]:
    """Streams whose client accepts no byte of their output."""
    writers = []
    for _ in range(NUM_UNREAD // STREAMS_OF_A_CONNECTION):
        _, writer = await http2.connect(mesh.address)
        writer.write(http2.hello(0))
        for stream in range(1, 2 * STREAMS_OF_A_CONNECTION, 2):
            writer.write(http2.call(stream, STREAM) + http2.message(stream, request(BUSY, "Hello")))
        writers.append(writer)
    started_at_s = time.monotonic()
    while await num_calls(mesh) < NUM_UNREAD:
        await asyncio.sleep(INTERVAL_S)
    print(f"  {NUM_UNREAD} calls at once had begun after {time.monotonic() - started_at_s:.1f} s")
    yield
    for writer in writers:
        writer.close()


async def num_calls(mesh: UpProcess) -> int:
    """Requests in the router."""
    models = (await mesh.client.status(timeout_s=30)).models
    return sum(
        model.num_requests_running + model.num_requests_waiting + model.num_requests_finished for model in models
    )


ATTACKS: dict[str, Attack] = {
    "nothing": nothing,
    "the largest message, again and again": sending_the_largest,
    f"{NUM_HALF_OPEN} half-sent largest messages": half_open,
    f"{NUM_GIANTS} prompts of 1 MiB of digits": giant_prompts,
    f"{NUM_SOCKETS} idle sockets": idle_sockets,
    f"{NUM_UNREAD} streams that are not read": unread_streams,
}


async def small_request_s(mesh: UpProcess) -> float:
    """Seconds until a request for one token has its output."""
    started_at_s = time.monotonic()
    await mesh.client.generate("Hello", model=SIM, max_new_tokens=1, timeout_s=30)
    return time.monotonic() - started_at_s


async def measure(name: str, attack: Attack, report: Report) -> None:
    """Runs one attack against a mesh of its own."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(MESH)
        file.flush()
        async with up("-c", file.name) as mesh:
            await _measure(mesh, name, attack, report)


async def _measure(mesh: UpProcess, name: str, attack: Attack, report: Report) -> None:
    router = mesh.pid_of("-m router")
    await small_request_s(mesh)
    before_mb, seconds, num_failed = peak_mb(router), [], 0
    async with attack(mesh):
        ends_at_s = time.monotonic() + SECONDS
        while time.monotonic() < ends_at_s:
            try:
                seconds.append(await small_request_s(mesh))
            except MeshError as error:
                print(f"  {error}")
                num_failed += 1
            await asyncio.sleep(INTERVAL_S)
    peak, worst_s = peak_mb(router), max(seconds, default=float("inf"))
    median_s = statistics.median(seconds) if seconds else float("inf")
    report.figures[name] = {
        "p50_s": median_s, "max_s": worst_s, "failed": num_failed, "router_mb": peak, "router_mb_before": before_mb,
    }  # fmt: skip
    print(f"{name}: small request p50 {median_s:.3f} s, max {worst_s:.3f} s, {num_failed} failed; router {peak:.0f} MB")
    report.bar(f"{name}: small request, max s", worst_s, f"under {MAX_REQUEST_S}, none fails",
               worst_s < MAX_REQUEST_S and not num_failed)  # fmt: skip
    report.bar(f"{name}: router, peak MB", peak, f"under {MAX_ROUTER_MB}", peak < MAX_ROUTER_MB)


async def main() -> int:
    """Measures; exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("attack", nargs="?", default="", help="only attacks whose name contains this")
    wanted = parser.parse_args().attack
    report = Report("hostile")
    for name, attack in ATTACKS.items():
        if wanted in name:
            await measure(name, attack, report)
    return 0 if report.write() else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
