"""A mesh without workers: it replays a script over the public gRPC API on a unix socket and records its requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from muxmesh.rpc.server import MeshServer
from muxmesh.v1 import inference_pb2, inference_pb2_grpc, mesh_pb2, mesh_pb2_grpc

FinishReason = inference_pb2.FinishInfo.FinishReason
Context = grpc.aio.ServicerContext[Any, Any]


class ScriptedMesh(inference_pb2_grpc.InferenceServicer, mesh_pb2_grpc.MeshServicer):
    """Replays ``script``: responses to send, then perhaps an error to raise. Serves ``vocab_sizes``, by model name.

    With ``holds`` a stream stays open after the script, until the client cancels it.
    """

    def __init__(self) -> None:
        self.vocab_sizes: dict[str, int] = {"m": 800}
        self.script: list[inference_pb2.GenerateResponse | Exception] = []
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.holds = False
        self.aborted = asyncio.Event()

    async def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        for step in self.script:
            if isinstance(step, Exception):
                raise step
            yield step
        if self.holds:
            try:
                await asyncio.Event().wait()
            finally:
                self.aborted.set()

    async def ListModels(self, request: mesh_pb2.ListModelsRequest, context: Context) -> mesh_pb2.ListModelsResponse:
        models = [mesh_pb2.ModelInfo(name=name, vocab_size=size) for name, size in self.vocab_sizes.items()]
        return mesh_pb2.ListModelsResponse(models=models)


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


@asynccontextmanager
async def scripted_mesh(folder: Path) -> AsyncIterator[tuple[ScriptedMesh, str]]:
    """Serves a `ScriptedMesh` on a unix socket; yields it with its address."""
    mesh = ScriptedMesh()  # type: ignore[abstract]  # a load test calls no other method
    server = MeshServer(
        {
            inference_pb2.DESCRIPTOR.services_by_name["Inference"]: lambda on: (
                inference_pb2_grpc.add_InferenceServicer_to_server(mesh, on)
            ),
            mesh_pb2.DESCRIPTOR.services_by_name["Mesh"]: lambda on: mesh_pb2_grpc.add_MeshServicer_to_server(mesh, on),
        }
    )
    address = f"unix:{folder / 'mesh.sock'}"
    await server.start([address])
    try:
        yield mesh, address
    finally:
        await server.stop(0.0)
