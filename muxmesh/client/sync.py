"""The sync client for scripts. It runs the async client on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from muxmesh.client.aio import Completion, Delta, MeshClient, Prompt
from muxmesh.errors import RequestAborted
from muxmesh.types import DEFAULT_ADDRESS
from muxmesh.v1 import mesh_pb2

T = TypeVar("T")


class SyncMeshClient:
    """`MeshClient` without async. Several threads may share it.

    >>> with SyncMeshClient() as client:
    ...     print(client.generate("Once upon a time", max_new_tokens=20).text)
    """

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        """See `MeshClient`."""
        self._loop = asyncio.new_event_loop()
        self._lock = threading.RLock()  # reentrant: garbage collection may close a stream while it is held
        self._is_closed = False  # guarded by the lock; once true, nothing more is submitted to the loop
        self._thread = threading.Thread(target=self._loop.run_forever, name="mesh client", daemon=True)
        self._thread.start()
        self._client = self._wait(self._open(address))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection and ends the thread. Calls in progress and later calls raise RequestAborted.

        A second close has no effect.
        """
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def generate(self, prompt: Prompt, **options: Any) -> Completion:
        """See `MeshClient.generate`."""
        return self._wait(self._client.generate(prompt, **options))

    def generate_many(self, prompt: Prompt, **options: Any) -> tuple[Completion, ...]:
        """See `MeshClient.generate_many`."""
        return self._wait(self._client.generate_many(prompt, **options))

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Delta]:
        """See `MeshClient.stream`. Closing the iterator aborts the request."""
        deltas = self._client.stream(prompt, **options)
        try:
            while (delta := self._wait(_next(deltas))) is not None:
                yield delta
        finally:
            with contextlib.suppress(RequestAborted):  # `close` has ended the stream
                self._wait(deltas.aclose())

    def list_models(self, timeout_s: float | None = None) -> list[mesh_pb2.ModelInfo]:
        """See `MeshClient.list_models`."""
        return self._wait(self._client.list_models(timeout_s))

    def status(self, timeout_s: float | None = 5.0) -> mesh_pb2.GetStatusResponse:
        """See `MeshClient.status`."""
        return self._wait(self._client.status(timeout_s))

    @staticmethod
    async def _open(address: str) -> MeshClient:
        return MeshClient(address)

    async def _shut_down(self) -> None:
        await self._client.close()
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*calls, return_exceptions=True)
        await self._loop.shutdown_asyncgens()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if self._is_closed:
                work.close()
                raise RequestAborted("the client is closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # after Ctrl-C, too, nothing may run on in the thread
            future.cancel()
            raise


async def _next(deltas: AsyncGenerator[Delta, None]) -> Delta | None:
    return await anext(deltas, None)
