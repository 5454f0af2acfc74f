"""The async client of the public API, muxmesh.v1: it sends requests, and repeats those that failed before a token.

It composes the parts of this package: options and prompts become a message, messages become values, and errors are
those of `muxmesh.errors`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from numbers import Integral
from random import Random
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc

from muxmesh.client.call_metadata import key_metadata, ticket_metadata
from muxmesh.client.connection import MeshConnection, Stubs
from muxmesh.client.option_values import Unfit, number
from muxmesh.client.outputs import Completion, Delta, completions_of, delta_of
from muxmesh.client.prompts import Conversation, Prompt, set_prompt
from muxmesh.client.request_options import OutputOptions, RequestOptions, request_of
from muxmesh.client.retries import Attempts, Retries
from muxmesh.client.tls import Tls
from muxmesh.client.tokens import Tokenized, detokenize_request, tokenize_request, tokenized_of
from muxmesh.errors import InvalidRequest, MeshError
from muxmesh.quoting import quoted
from muxmesh.types import DEFAULT_ADDRESS
from muxmesh.v1 import inference_pb2, mesh_pb2

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

DEFAULT_CONNECT_TIMEOUT_S = 5.0


class MeshClient:
    """A client of a mesh. It connects with the first call, on any event loop, and serves calls side by side.

    >>> async with MeshClient("127.0.0.1:50051") as client:
    ...     completion = await client.generate([Message("user", "Why is the sky blue?")], temperature=0)
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
        """``address``: HOST:PORT, or any gRPC target such as ``ipv4:10.0.0.1:50051,10.0.0.2:50051``.

        Calls are spread over several addresses in turn; an address that cannot be reached gets none. The connection to
        an address of this machine goes through no HTTP proxy; others honour gRPC's environment variables for proxies.
        ``retries`` repeats calls that failed before their first token because the mesh could not be reached; by default
        as `Retries` says. ``rng`` spreads the retries of many clients. ``api_key``: of a mesh that needs one. ``tls``:
        True for TLS with the CAs that this system trusts, or `Tls` with files, which are read here and not again.
        Raises InvalidRequest.
        """
        _check_seconds("connect_timeout_s", connect_timeout_s)
        self._connection = MeshConnection(address, connect_timeout_s, tls)
        self._retries = Retries() if retries is None else retries
        self._rng = Random() if rng is None else rng
        self._metadata = key_metadata(api_key)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection. Calls in progress and later calls raise RequestAborted."""
        await self._connection.close()

    def stream(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> AsyncGenerator[Delta, None]:
        """Streams the output as it is generated. Closing the generator aborts the request.

        `RequestOptions` describes the options. Nothing is sent before the first delta is asked for.

        Raises InvalidRequest at once for what cannot be sent, and TypeError for an unknown option; while it streams,
        InvalidRequest, ModelNotFound, Overloaded, QuotaExceeded, Unauthenticated, PermissionDenied, DeadlineExceeded,
        Unavailable, RequestAborted, InternalError.
        """
        timeout_s = options.get("timeout_s")
        _check_seconds("timeout_s", timeout_s)
        request = request_of(options)
        set_prompt(request, prompt)
        return self._stream(request, timeout_s)

    async def generate(self, prompt: Prompt, **options: Unpack[OutputOptions]) -> Completion:
        """Returns the complete output. Takes the options of `stream`, without ``num_sequences``; raises the same."""
        wanted = dict(options).get("num_sequences")
        if not (wanted is None or (isinstance(wanted, Integral) and wanted == 1)):
            raise InvalidRequest("num_sequences", "generate returns one output; use generate_many for several")
        (completion,) = await self.generate_many(prompt, **options)
        return completion

    async def generate_many(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> tuple[Completion, ...]:
        """Returns all ``num_sequences`` complete outputs, in order of their index. See `stream`."""
        return completions_of([delta async for delta in self.stream(prompt, **options)])

    async def stream_request(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None = None
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """Calls GenerateStream with a request message that the caller has built; no field is checked."""
        attempts, metadata = self._attempts(timeout_s), self._metadata
        while True:
            stubs = await self._connection.ready(attempts.remaining_s(_now_s()))
            call = stubs.inference.GenerateStream(request, timeout=attempts.remaining_s(_now_s()), metadata=metadata)
            try:
                with self._connection.errors(attempts):
                    async for response in call:
                        attempts.has_begun = True
                        yield response
                return
            except MeshError as error:
                delay_s = attempts.delay_before_retry_s(error, _now_s())
                metadata = (*self._metadata, *ticket_metadata(error))
            finally:
                call.cancel()
            await asyncio.sleep(delay_s)

    async def list_models(self, timeout_s: float | None = None) -> list[mesh_pb2.ModelInfo]:
        """Returns the models that the mesh serves."""
        response = await self._unary(lambda stubs: stubs.mesh.ListModels, mesh_pb2.ListModelsRequest(), timeout_s)
        return list(response.models)

    async def tokenize(
        self,
        prompt: str | Conversation,
        *,
        model: str | None = None,
        add_special_tokens: bool | None = None,
        with_texts: bool = False,
        timeout_s: float | None = None,
    ) -> Tokenized:
        """Returns the token ids of a text or a conversation, as `generate` would compute them; generates nothing.

        ``add_special_tokens`` adds the tokenizer's own, such as a first token. None: to a text, not to a conversation,
        whose template writes them. ``with_texts`` fills `Tokenized.texts` and `Tokenized.token_bytes`. Raises the
        errors of `stream`.
        """
        request = tokenize_request(prompt, model, add_special_tokens, with_texts)
        response = await self._unary(lambda stubs: stubs.inference.Tokenize, request, timeout_s)
        return tokenized_of(response)

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str | None = None,
        skip_special_tokens: bool = False,
        timeout_s: float | None = None,
    ) -> str:
        """Returns the text of token ids, at most as many as the context holds. Raises the errors of `stream`."""
        request = detokenize_request(token_ids, model, skip_special_tokens)
        response = await self._unary(lambda stubs: stubs.inference.Detokenize, request, timeout_s)
        return response.text

    async def status(self, timeout_s: float | None = 5.0) -> mesh_pb2.GetStatusResponse:
        """Returns the state of models, units and processes, as the router that is called sees it."""
        return await self._unary(lambda stubs: stubs.mesh.GetStatus, mesh_pb2.GetStatusRequest(), timeout_s)

    async def _stream(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None
    ) -> AsyncGenerator[Delta, None]:
        wanted = request.response
        async with aclosing(self.stream_request(request, timeout_s)) as responses:
            async for response in responses:
                yield delta_of(response, wanted.output_candidates.top_n, wanted.prompt_candidates.top_n)

    async def _unary(
        self,
        method: Callable[[Stubs], grpc.aio.UnaryUnaryMultiCallable[_Request, _Response]],
        request: _Request,
        timeout_s: float | None,
    ) -> _Response:
        attempts = self._attempts(timeout_s)
        while True:
            stubs = await self._connection.ready(attempts.remaining_s(_now_s()))
            try:
                with self._connection.errors(attempts):
                    remaining_s = attempts.remaining_s(_now_s())
                    return await method(stubs)(request, timeout=remaining_s, metadata=self._metadata)
            except MeshError as error:
                delay_s = attempts.delay_before_retry_s(error, _now_s())
            await asyncio.sleep(delay_s)

    def _attempts(self, timeout_s: float | None) -> Attempts:
        _check_seconds("timeout_s", timeout_s)
        return Attempts(self._retries, self._rng, None if timeout_s is None else _now_s() + timeout_s)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _check_seconds(name: str, seconds: object) -> None:
    """Raises InvalidRequest unless ``seconds`` is None or a finite number above 0."""
    try:
        if seconds is None or 0 < number(seconds) < math.inf:
            return
    except Unfit:
        pass
    raise InvalidRequest(name, f"is {quoted(seconds)}; a finite number of seconds above 0, or None for no limit")
