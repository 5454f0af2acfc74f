"""The target for a mesh, over its public gRPC API."""

from __future__ import annotations

from collections.abc import AsyncIterator

from loadtest.target import Piece, ServedModel, StreamEnd, TargetError
from loadtest.workload import PlannedRequest
from muxmesh.client import NO_RETRIES, MeshClient, Message, Prompt, Tls
from muxmesh.errors import InternalError, MeshError, Unavailable
from muxmesh.rpc.status_codes import status_code
from muxmesh.slo import Slo
from muxmesh.v1 import mesh_pb2

_CONNECT_TIMEOUT_S = 10.0


def _slo(info: mesh_pb2.ModelInfo) -> Slo | None:
    if not info.HasField("slo"):
        return None
    limits = {name: getattr(info.slo, name) for name in ("ttft_s", "tpot_s", "scale") if info.slo.HasField(name)}
    return Slo(**limits)


class MeshTarget:
    """See `Target`. A request's tenant is its cache salt, so tenants share no cached prefix."""

    def __init__(
        self,
        address: str,
        temperature: float | None,
        timeout_s: float | None,
        tls: Tls | bool = False,
        api_key: str | None = None,
    ) -> None:
        self.name = f"mesh at {address}"
        self._client = MeshClient(
            address, connect_timeout_s=_CONNECT_TIMEOUT_S, retries=NO_RETRIES, tls=tls, api_key=api_key
        )
        self._temperature = temperature
        self._timeout_s = timeout_s

    async def models(self) -> list[ServedModel]:
        infos = await self._client.list_models(timeout_s=_CONNECT_TIMEOUT_S)
        # Special tokens are among the first and the last ids of most vocabularies.
        return [
            ServedModel(info.name, range(info.vocab_size // 8, info.vocab_size * 3 // 4), slo=_slo(info))
            for info in infos
        ]

    async def stream(self, request: PlannedRequest) -> AsyncIterator[Piece | StreamEnd]:
        prompt: Prompt = [Message("user", str(request.prompt))] if request.is_chat else request.prompt
        num_input = num_cached = 0
        try:
            async for delta in self._client.stream(
                prompt,
                model=request.model,
                max_new_tokens=request.max_new_tokens,
                min_new_tokens=request.max_new_tokens if request.is_forced else 0,
                ignore_eos=request.is_forced,
                temperature=self._temperature,
                seed=request.seed,
                priority=request.priority,
                cache_salt=request.sent_salt,
                timeout_s=self._timeout_s,
            ):
                if delta.prompt is not None:
                    num_input, num_cached = delta.prompt.num_tokens, delta.prompt.num_cached_tokens
                if delta.token_ids:
                    yield Piece(len(delta.token_ids))
                if delta.finish is not None:
                    finish, timings = delta.finish, delta.timings
                    router_s = timings.router_s if timings else None
                    yield StreamEnd(num_input, finish.num_output_tokens, finish.reason, num_cached, router_s)
                    return
        except MeshError as error:
            raise TargetError(
                status_code(error).name, str(error), is_unreachable=isinstance(error, Unavailable)
            ) from error
        raise TargetError("INTERNAL", str(InternalError("the stream ended without a finish reason")))

    async def close(self) -> None:
        await self._client.close()
