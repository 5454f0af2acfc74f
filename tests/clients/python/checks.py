"""Runs checks and prints one line for each. The clients of this folder run in environments without muxmesh."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from google.rpc import error_details_pb2
from grpclib.client import Channel
from grpclib.const import Status
from grpclib.exceptions import GRPCError

MESSAGE_CHARACTERS = 300


class Client(Protocol):
    """The checks of one client library. Each raises an exception if it fails."""

    async def list_models(self) -> None: ...
    async def generate(self) -> None: ...
    async def stream(self) -> None: ...
    async def chat(self) -> None: ...
    async def seed(self) -> None: ...
    async def log_probabilities(self) -> None: ...
    async def tokenize(self) -> None: ...
    async def refusal(self) -> None: ...
    async def cancel(self) -> None: ...
    async def deadline(self) -> None: ...


async def run_all(make_client: Callable[[Channel], Client]) -> int:
    """Runs all checks against the mesh at the address that is the program's argument; returns the exit code."""
    host, port = sys.argv[1].rsplit(":", 1)
    channel = Channel(host, int(port))
    client = make_client(channel)
    try:
        succeeded = [
            await _run(name, check)
            for name, check in (
                ("list models", client.list_models),
                ("generate", client.generate),
                ("stream", client.stream),
                ("chat", client.chat),
                ("seed", client.seed),
                ("log-probabilities", client.log_probabilities),
                ("tokenize", client.tokenize),
                ("refusal", client.refusal),
                ("cancel", client.cancel),
                ("deadline", client.deadline),
            )
        ]
    finally:
        channel.close()
    return 0 if all(succeeded) else 1


async def _run(name: str, check: Callable[[], Awaitable[None]]) -> bool:
    """Prints the result of one check; an exception of any kind is its failure."""
    try:
        await check()
    except Exception as error:  # noqa: BLE001 - whatever a library raises is a result
        where = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{type(error).__name__} {error} ({where.name}, line {where.lineno}: {where.line})"
        print(f"{name}: FAILED: {' '.join(problem.split())[:MESSAGE_CHARACTERS]}", flush=True)
        return False
    print(f"{name}: ok", flush=True)
    return True


@contextmanager
def fails(status: Status, field: str = "") -> Iterator[None]:
    """Expects a call to fail with a status, and with ``field`` in its google.rpc.BadRequest."""
    error: GRPCError | None = None
    try:
        yield
    except GRPCError as caught:
        error = caught
    assert error is not None, f"the call succeeded; {status.name} was expected"
    assert error.status is status, error
    if field:
        details = [one for one in error.details or () if isinstance(one, error_details_pb2.BadRequest)]
        assert [violation.field for one in details for violation in one.field_violations] == [field], error.details


@contextmanager
def reaches_its_deadline() -> Iterator[None]:
    """Expects a call to end at its deadline. Its client or the server may be the first to end it."""
    try:
        yield
    except TimeoutError:
        return
    except GRPCError as error:
        if error.status is not Status.DEADLINE_EXCEEDED:
            raise
        return
    raise AssertionError("the call outlived its deadline")


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Waits until ``condition`` holds, for ten seconds at most."""
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.05)
