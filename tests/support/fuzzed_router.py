"""A router's public API on a port, in a thread of its own, for tests that send it arbitrary bytes.

Everything but the computation is real: server, limits, validation, tokenizer and pipeline. Attempts write a fixed text.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, cast

import grpc

from muxmesh.config.schema import RouterConfig
from muxmesh.rpc.server import MeshServer
from muxmesh.supervisor.mesh_supervisor import free_listen_address
from muxmesh.v1 import inference_pb2, inference_pb2_grpc
from router.api.inference_service import InferenceService
from router.api.request_observer import RequestObserver
from router.public_limits import public_limits
from tests.support.pipeline_parts import PipelineParts, pipeline_parts, served_model, writes

OUTPUT = "fine"
_GENERATE = "/muxmesh.v1.Inference/Generate"
_REFUSED_BY_GRPC = "ExecuteBatchError raised in core by servicer method []"
"""gRPC's own log of a call without a method, which it refused while the client went away. No code of ours is called."""


class FuzzedRouter:
    """The client's side, and what must hold after any input."""

    def __init__(self, address: str, parts: PipelineParts, loop: asyncio.AbstractEventLoop) -> None:
        self.address = address
        self._parts = parts
        self._loop = loop
        self._channel: Any = grpc.insecure_channel(address)
        self._errors: list[logging.LogRecord] = []
        self._handler = logging.Handler(logging.ERROR)
        cast(Any, self._handler).emit = self._note
        logging.getLogger().addHandler(self._handler)
        self.generate()
        self._num_tasks = self._count_tasks()

    def _note(self, one: logging.LogRecord) -> None:
        if not (one.name.startswith("grpc.") and one.getMessage() == _REFUSED_BY_GRPC):
            self._errors.append(one)

    def call(self, path: str, raw: bytes) -> grpc.StatusCode:
        """Sends a message and returns the status, after all responses."""
        try:
            for _ in self._channel.unary_stream(path)(raw, timeout=60):
                pass
        except grpc.RpcError as error:
            return cast(grpc.Call, error).code()
        return grpc.StatusCode.OK

    def generate(self) -> None:
        """A request of a client that behaves well: it is served."""
        raw = inference_pb2.GenerateRequest(model="m", text="hello").SerializeToString()
        response = self._channel.unary_unary(_GENERATE)(raw, timeout=60)
        assert inference_pb2.GenerateResponse.FromString(response).outputs.text == OUTPUT

    def check(self) -> None:
        """Nothing was logged as an error, and nothing is left of the calls that have ended."""
        assert not self._errors, self._errors[0].getMessage()
        counters = self._parts.pipeline.counters["m"]
        assert (counters.num_running, counters.num_preparing, self._parts.admission.num_unreturned) == (0, 0, 0)

    def check_tasks(self) -> None:
        """No task is left of the calls and connections that have ended."""
        self.generate()
        assert self._count_tasks() <= self._num_tasks

    def close(self) -> None:
        self._channel.close()
        logging.getLogger().removeHandler(self._handler)

    def _count_tasks(self) -> int:
        async def settled() -> int:
            previous, number = -1, 0
            while number != previous:  # a call's own tasks end after its client has the status
                previous, number = number, len(asyncio.all_tasks())
                for _ in range(100):
                    await asyncio.sleep(0)
            return number

        return asyncio.run_coroutine_threadsafe(settled(), self._loop).result(60)


@contextmanager
def fuzzed_router() -> Iterator[FuzzedRouter]:
    """Serves one model, "m", with a context of 2,000 tokens."""
    ready: Future[tuple[str, PipelineParts, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        config, model, stop = (
            RouterConfig(max_prompt_bytes=cast(Any, 65_536)),
            served_model(max_model_len=2000),
            asyncio.Event(),
        )
        async with pipeline_parts(writes(OUTPUT), model, config=config) as parts:
            service = InferenceService(
                parts.pipeline, parts.clock, random.Random(1), RequestObserver(parts.metrics, parts.clock)
            )
            register = functools.partial(inference_pb2_grpc.add_InferenceServicer_to_server, service)
            descriptor = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
            server = MeshServer({descriptor: register}, public_limits(config, [model], 1000))
            address = free_listen_address("127.0.0.1:0")
            await server.start([address])
            ready.set_result((address, parts, asyncio.get_running_loop(), stop))
            await stop.wait()
            await server.stop(0)

    with ThreadPoolExecutor(1) as thread:
        serving = thread.submit(asyncio.run, serve())
        futures: set[Future[Any]] = {ready, serving}
        if serving in wait(futures, 60, FIRST_COMPLETED).done:
            serving.result()  # raises the error of a failed start
        address, parts, loop, stop = ready.result()
        router = FuzzedRouter(address, parts, loop)
        try:
            yield router
        finally:
            router.close()
            loop.call_soon_threadsafe(stop.set)
            serving.result(60)
