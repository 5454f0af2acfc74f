"""The sync face for scripts: the async client on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from muxmesh.client.aio import Completion, Delta, MeshClient, Prompt
from muxmesh.types import DEFAULT_ADDRESS
from muxmesh.v1 import mesh_pb2

T = TypeVar("T")


class SyncMeshClient:
    """`MeshClient` without async. May be shared by threads.

    >>> with SyncMeshClient() as client:
    ...     print(client.generate("Once upon a time", max_new_tokens=20).text)
    """

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        """See `MeshClient`."""
        self._loop = asyncio.new_event_loop()
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
        """Closes the connection and ends the thread."""
        self._wait(self._client.close())
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
        """See `MeshClient.stream`. Leaving the loop early aborts the request."""
        deltas = self._client.stream(prompt, **options)
        try:
            while (delta := self._wait(_next(deltas))) is not None:
                yield delta
        finally:
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

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C too: what runs on the loop must not go on unseen
            future.cancel()
            raise


async def _next(deltas: AsyncGenerator[Delta, None]) -> Delta | None:
    return await anext(deltas, None)
