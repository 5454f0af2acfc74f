"""Runs checks and prints one line for each. The clients of this folder run in environments without muxmesh."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from google.rpc import error_details_pb2
from grpclib.const import Status
from grpclib.exceptions import GRPCError

MESSAGE_CHARACTERS = 300


class Checks:
    """Counts the checks that failed."""

    def __init__(self) -> None:
        self.num_failed = 0

    async def run(self, name: str, body: Callable[[], Awaitable[None]]) -> None:
        """Prints the result of one check; an exception of any kind is its failure."""
        try:
            await body()
            print(f"{name}: ok", flush=True)
        except Exception as error:  # noqa: BLE001 - whatever a library raises is a result
            self.num_failed += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{type(error).__name__} {error} ({where.name}, line {where.lineno}: {where.line})"
            print(f"{name}: FAILED: {' '.join(problem.split())[:MESSAGE_CHARACTERS]}", flush=True)


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


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Waits until ``condition`` holds, for ten seconds at most."""
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.05)
