"""A server that speaks muxmesh.v1 and replays scripts. It has no router, no workers and no models.

The server, its error table and its message limits are the real ones of `muxmesh.rpc.server`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc

from muxmesh.errors import InternalError, InvalidRequest, ModelNotFound
from muxmesh.rpc.server import MeshServer
from muxmesh.supervisor.mesh_supervisor import free_listen_address
from muxmesh.v1 import inference_pb2, inference_pb2_grpc, mesh_pb2, mesh_pb2_grpc

FinishReason = inference_pb2.FinishInfo.FinishReason
Context = grpc.aio.ServicerContext[Any, Any]
Step = inference_pb2.GenerateResponse | Exception | grpc.StatusCode | asyncio.Event | Callable[[], None]
"""One step of a script: send a response, raise an error, end with a bare status, wait for an event, or call a function.
"""


def output(*texts: str, **finish: Any) -> list[inference_pb2.GenerateResponse]:
    """The responses that stream ``texts`` as sequences 0, 1, ..., in turn, with one token per character.

    A token id is the code point of its character. The prompt has three tokens and the seed is 7; TTFT is 0.5 s and E2E
    is 1.5 s. ``finish`` sets fields of every FinishInfo; the default reason is LENGTH.
    """
    responses = [
        inference_pb2.GenerateResponse(
            outputs=inference_pb2.SequenceOutput(
                index=index, text=text[offset], num_tokens=1, token_ids=[ord(text[offset])]
            )
        )
        for offset in range(max(map(len, texts)))
        for index, text in enumerate(texts)
        if offset < len(text)
    ]
    for index, text in enumerate(texts):
        last = next(response.outputs for response in reversed(responses) if response.outputs.index == index)
        info = {"finish_reason": inference_pb2.FinishInfo.LENGTH, **finish, "num_output_tokens": len(text)}
        last.finish_info.CopyFrom(inference_pb2.FinishInfo(**info))
    responses[0].prompt_info.CopyFrom(inference_pb2.PromptInfo(num_prompt_tokens=3, seed=7))
    responses[-1].timings.CopyFrom(
        inference_pb2.RequestTimings(queue_s=0.25, ttft_s=0.5, e2e_s=1.5, num_restarts=2, router_s=0.125)
    )
    return responses


def first(num_tokens: int, num_cached: int, token_ids: Sequence[int] = ()) -> inference_pb2.GenerateResponse:
    """The first response of a stream, with the facts of the prompt."""
    response = tokens(*token_ids)
    response.prompt_info.num_prompt_tokens = num_tokens
    response.prompt_info.num_cached_tokens = num_cached
    return response


def tokens(*token_ids: int) -> inference_pb2.GenerateResponse:
    output = inference_pb2.SequenceOutput(token_ids=token_ids, num_tokens=len(token_ids))
    return inference_pb2.GenerateResponse(outputs=output)


def last(
    num_output: int,
    token_ids: Sequence[int] = (),
    reason: FinishReason.ValueType = inference_pb2.FinishInfo.LENGTH,
    router_s: float | None = None,
) -> inference_pb2.GenerateResponse:
    """The last response of a stream, with the finish reason, and the timings if ``router_s`` is given."""
    response = tokens(*token_ids)
    response.outputs.finish_info.num_output_tokens = num_output
    response.outputs.finish_info.finish_reason = reason
    if router_s is not None:
        response.timings.router_s = router_s
    return response


class FakeMesh(inference_pb2_grpc.InferenceServicer, mesh_pb2_grpc.MeshServicer):
    """Replays ``script`` on every GenerateStream call and records the requests.

    The first calls replay one each of ``scripts`` instead, and the first calls for a status return one each of
    ``statuses``. ``script``, ``scripts``, ``models``, ``vocab_sizes``, ``slos``, ``without_chat_template``, ``status``,
    ``statuses`` and ``unary_error`` may be replaced between calls. A vocabulary has 259 tokens if ``vocab_sizes`` has
    no number for its model.
    """

    def __init__(self, address: str, script: Sequence[Step]) -> None:
        self.address = address
        self.script = script
        self.scripts: list[Sequence[Step]] = []
        self.models = ["m"]
        self.without_chat_template: set[str] = set()
        self.vocab_sizes: dict[str, int] = {}
        self.slos: dict[str, mesh_pb2.Slo] = {}
        self.status = mesh_pb2.GetStatusResponse(version="1.2.3", redis_connected=True, order_policy="fcfs")
        self.statuses: list[mesh_pb2.GetStatusResponse] = []
        self.unary_error: Exception | None = None
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.token_requests: list[inference_pb2.TokenizeRequest | inference_pb2.DetokenizeRequest] = []
        self.deadlines_s: list[float | None] = []
        self.num_list_calls = 0
        self.num_ended = 0
        """GenerateStream calls that have ended: completed, failed, or cancelled by the client."""
        self._changed = asyncio.Condition()
        self._loop = asyncio.get_running_loop()

    async def until(self, condition: Callable[[FakeMesh], bool]) -> None:
        """Waits until ``condition`` holds; it is checked when a GenerateStream call begins or ends."""
        async with asyncio.timeout(20), self._changed:
            await self._changed.wait_for(lambda: condition(self))

    def wait_until(self, condition: Callable[[FakeMesh], bool]) -> None:
        """`until` for a caller in another thread than the server's."""
        asyncio.run_coroutine_threadsafe(self.until(condition), self._loop).result()

    async def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        self.deadlines_s.append(context.time_remaining())
        await self._notify()
        try:
            if not request.model and len(self.models) > 1:
                raise InvalidRequest(
                    "model", f"is needed, because the mesh serves several; one of: {', '.join(self.models)}"
                )
            if not self.models or (request.model or self.models[0]) not in self.models:
                raise ModelNotFound(f"model: {request.model!r} is not served")
            for step in self.scripts.pop(0) if self.scripts else self.script:
                if isinstance(step, inference_pb2.GenerateResponse):
                    yield step
                elif isinstance(step, Exception):
                    raise step
                elif isinstance(step, grpc.StatusCode):
                    await context.abort(step, f"status {step.name}")
                elif isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    step()
        finally:
            self.num_ended += 1
            await self._notify()

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        raise InternalError("Generate has no script")

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        """One token for each character: its code point. The text of é is that of a part of a character."""
        self.token_requests.append(request)
        text = request.text or "".join(message.content for message in request.chat.messages)
        response = inference_pb2.TokenizeResponse(token_ids=map(ord, text), num_tokens=len(text), max_model_len=100)
        if request.token_texts:
            response.token_bytes.extend(character.encode("latin-1") for character in text)
            response.token_texts.extend(one.decode(errors="replace") for one in response.token_bytes)
        return response

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        self.token_requests.append(request)
        return inference_pb2.DetokenizeResponse(text="".join(map(chr, request.token_ids)))

    async def ListModels(self, request: mesh_pb2.ListModelsRequest, context: Context) -> mesh_pb2.ListModelsResponse:
        self.num_list_calls += 1
        if self.unary_error is not None:
            raise self.unary_error
        return mesh_pb2.ListModelsResponse(
            models=[
                mesh_pb2.ModelInfo(
                    name=name,
                    engine="sim",
                    vocab_size=self.vocab_sizes.get(name, 259),
                    has_chat_template=name not in self.without_chat_template,
                    slo=self.slos.get(name),
                )
                for name in self.models
            ]
        )

    async def GetModelInfo(
        self, request: mesh_pb2.GetModelInfoRequest, context: Context
    ) -> mesh_pb2.GetModelInfoResponse:
        raise ModelNotFound(f"model: {request.model!r} has no information")

    async def GetStatus(self, request: mesh_pb2.GetStatusRequest, context: Context) -> mesh_pb2.GetStatusResponse:
        if self.unary_error is not None:
            raise self.unary_error
        return self.statuses.pop(0) if self.statuses else self.status

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


@asynccontextmanager
async def fake_mesh(
    address: str | Path, script: Sequence[Step] = (), credentials: grpc.ServerCredentials | None = None
) -> AsyncIterator[FakeMesh]:
    """Serves a `FakeMesh` on the running loop.

    ``address`` is HOST:PORT, where port 0 picks a free port, or a folder for a unix socket. ``credentials``: of TLS.
    """
    where = f"unix:{address / 'mesh.sock'}" if isinstance(address, Path) else free_listen_address(address)
    fake = FakeMesh(where, script or output("abc"))
    server = MeshServer(
        {
            inference_pb2.DESCRIPTOR.services_by_name["Inference"]: lambda server: (
                inference_pb2_grpc.add_InferenceServicer_to_server(fake, server)
            ),
            mesh_pb2.DESCRIPTOR.services_by_name["Mesh"]: lambda server: mesh_pb2_grpc.add_MeshServicer_to_server(
                fake, server
            ),
        }
    )
    await server.start([where], {} if credentials is None else {where: credentials})
    try:
        yield fake
    finally:
        await server.stop(0)


@contextmanager
def fake_mesh_in_thread(folder: Path, script: Sequence[Step] = ()) -> Iterator[FakeMesh]:
    """Serves a `FakeMesh` on an event loop in a thread, for callers that block or run a loop of their own."""
    ready: Future[tuple[FakeMesh, asyncio.AbstractEventLoop]] = Future()
    stop = asyncio.Event()

    async def serve() -> None:
        async with fake_mesh(folder, script) as fake:
            ready.set_result((fake, asyncio.get_running_loop()))
            await stop.wait()

    with ThreadPoolExecutor(1, "fake mesh") as thread:
        serving = thread.submit(asyncio.run, serve())
        futures: set[Future[Any]] = {ready, serving}
        if serving in wait(futures, return_when=FIRST_COMPLETED).done:
            serving.result()  # raises the error of a failed start
        fake, loop = ready.result()
        try:
            yield fake
        finally:
            loop.call_soon_threadsafe(stop.set)
            serving.result()
