"""The sync client for scripts. It runs the async client on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Sequence
from random import Random
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from muxmesh.client.aio import DEFAULT_CONNECT_TIMEOUT_S, MeshClient
from muxmesh.client.connection import refuse_inherited
from muxmesh.client.outputs import Completion, Delta
from muxmesh.client.prompts import Conversation, Prompt
from muxmesh.client.request_options import OutputOptions, RequestOptions
from muxmesh.client.retries import Retries
from muxmesh.client.tls import Tls
from muxmesh.client.tokens import Tokenized
from muxmesh.errors import RequestAborted
from muxmesh.types import DEFAULT_ADDRESS
from muxmesh.v1 import mesh_pb2

T = TypeVar("T")


class SyncMeshClient:
    """`MeshClient` without async. Several threads may share it. The first call starts its thread.

    >>> with SyncMeshClient() as client:
    ...     print(client.generate("Once upon a time", max_new_tokens=20).text)
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        connect_timeout_s: float | None = DEFAULT_CONNECT_TIMEOUT_S,
        retries: Retries | None = None,
        rng: Random | None = None,
        api_key: str | None = None,
        tls: Tls | bool = False,
    ) -> None:
        """See `MeshClient`."""
        self._client = MeshClient(
            address, connect_timeout_s=connect_timeout_s, retries=retries, rng=rng, api_key=api_key, tls=tls
        )
        self._lock = threading.RLock()  # reentrant: garbage collection may close a stream while it is held
        self._is_closed = False  # guarded by the lock; once true, nothing more is submitted to the loop
        self._thread: _LoopThread | None = None  # guarded by the lock

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
            thread = self._thread
        atexit.unregister(self.close)
        if thread is not None and thread.is_of_this_process:
            thread.end(self._shut_down())

    def generate(self, prompt: Prompt, **options: Unpack[OutputOptions]) -> Completion:
        """See `MeshClient.generate`."""
        return self._wait(self._client.generate(prompt, **options))

    def generate_many(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> tuple[Completion, ...]:
        """See `MeshClient.generate_many`."""
        return self._wait(self._client.generate_many(prompt, **options))

    def stream(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Generator[Delta, None, None]:
        """See `MeshClient.stream`. Closing the generator aborts the request."""
        return self._stream(self._client.stream(prompt, **options))

    def tokenize(
        self,
        prompt: str | Conversation,
        *,
        model: str | None = None,
        add_special_tokens: bool | None = None,
        with_texts: bool = False,
        timeout_s: float | None = None,
    ) -> Tokenized:
        """See `MeshClient.tokenize`."""
        return self._wait(
            self._client.tokenize(
                prompt,
                model=model,
                add_special_tokens=add_special_tokens,
                with_texts=with_texts,
                timeout_s=timeout_s,
            )
        )

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str | None = None,
        skip_special_tokens: bool = False,
        timeout_s: float | None = None,
    ) -> str:
        """See `MeshClient.detokenize`."""
        return self._wait(
            self._client.detokenize(
                token_ids, model=model, skip_special_tokens=skip_special_tokens, timeout_s=timeout_s
            )
        )

    def list_models(self, timeout_s: float | None = None) -> list[mesh_pb2.ModelInfo]:
        """See `MeshClient.list_models`."""
        return self._wait(self._client.list_models(timeout_s))

    def status(self, timeout_s: float | None = 5.0) -> mesh_pb2.GetStatusResponse:
        """See `MeshClient.status`."""
        return self._wait(self._client.status(timeout_s))

    def _stream(self, deltas: AsyncGenerator[Delta, None]) -> Generator[Delta, None, None]:
        try:
            while (delta := self._wait(_next(deltas))) is not None:
                yield delta
        finally:
            with contextlib.suppress(RequestAborted):  # `close` has ended the stream
                self._wait(deltas.aclose())

    async def _shut_down(self) -> None:
        await self._client.close()
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.get_running_loop().shutdown_asyncgens()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            with self._lock:
                future = asyncio.run_coroutine_threadsafe(work, self._running_loop())
        except RequestAborted:
            work.close()
            raise
        try:
            return future.result()
        except BaseException:  # after Ctrl-C, too, nothing may run on in the thread
            future.cancel()
            raise

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._is_closed:
            raise RequestAborted("the client is closed")
        if self._thread is None:
            self._thread = _LoopThread()
            atexit.register(self.close)  # the interpreter stops the thread, and then a stream would wait for it
        if not self._thread.is_of_this_process:
            refuse_inherited()
            raise RequestAborted("the client was used before a fork; make a client in each process")
        return self._thread.loop


class _LoopThread:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._process_id = os.getpid()
        self._thread = threading.Thread(target=self.loop.run_forever, name="mesh client", daemon=True)
        self._thread.start()

    @property
    def is_of_this_process(self) -> bool:
        """False after a fork, which copies no thread."""
        return self._process_id == os.getpid()

    def end(self, last_work: Coroutine[Any, Any, None]) -> None:
        """Runs ``last_work`` and ends the thread."""
        asyncio.run_coroutine_threadsafe(last_work, self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


async def _next(deltas: AsyncGenerator[Delta, None]) -> Delta | None:
    return await anext(deltas, None)
