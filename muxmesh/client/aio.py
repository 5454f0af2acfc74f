"""The async client of the public API, muxmesh.v1.

It knows the wire messages and maps them to plain values; gRPC errors become those of `muxmesh.errors`. It checks only
what the wire cannot carry: the router validates everything else. It does not retry: a request is sent once.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Literal, Self

import grpc

from muxmesh.errors import InternalError, InvalidRequest, ModelNotFound, RequestAborted
from muxmesh.rpc.limits import MAX_MESSAGE_BYTES
from muxmesh.rpc.status_codes import from_rpc_error
from muxmesh.types import DEFAULT_ADDRESS, Candidate, KvFormat, TokenLogprobs
from muxmesh.v1 import inference_pb2, inference_pb2_grpc, mesh_pb2, mesh_pb2_grpc

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.use_local_subchannel_pool", 1),
)


_UINT32 = range(1 << 32)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. ``role`` is system, user or assistant."""

    role: str
    content: str


Prompt = str | Sequence[int] | Sequence[Message]
"""Plain text, token ids, or a conversation for the model's chat template."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of an output sequence.

    ``stopped_by`` is the token id or the stop string that ended it, and None if ``reason`` is not stop.
    """

    reason: Literal["length", "stop", "aborted"]
    num_output_tokens: int
    stopped_by: int | str | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """Measured at the router, in seconds from arrival.

    ``num_restarts`` counts further attempts after a worker was lost or the KV pool was full. ``router_s`` is the part
    of ``ttft_s`` that the router itself took.
    """

    queue_s: float
    ttft_s: float
    e2e_s: float
    num_restarts: int
    router_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Scheduling:
    """Why a request was served when it was. Times are in seconds; see SchedulingInfo in the proto.

    ``source`` names the origin of the expected length. ``decision`` numbers the unit's admissions from 1.
    ``num_overtaken`` requests of the same model and priority had arrived earlier and still waited.
    """

    policy: str
    reason: str
    p50_output_tokens: float
    p90_output_tokens: float
    source: str
    prefill_s: float
    decode_s: float
    waited_s: float
    decision: int
    num_overtaken: int


@dataclass(frozen=True, slots=True)
class PromptFacts:
    """What the mesh reports about a prompt.

    ``seed`` reproduces the output. ``num_cached_tokens`` of the prompt were found in the prefix cache. ``logprobs``
    belong to the second token and those after it. ``logprobs`` and ``scheduling`` are filled only on request.
    ``predicted_output_tokens`` is None if the mesh made no prediction.
    """

    num_tokens: int
    num_cached_tokens: int
    seed: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    predicted_output_tokens: int | None = None
    scheduling: Scheduling | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """New text and tokens of the output sequence ``index``. ``logprobs`` has one entry per token if requested.

    ``prompt`` is set in the first delta of the stream, ``finish`` in the last delta of each sequence, ``timings`` in
    the last delta of the stream.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    num_tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt: PromptFacts | None = None
    finish: Finish | None = None
    timings: Timings | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A complete output sequence."""

    text: str
    token_ids: tuple[int, ...]
    prompt: PromptFacts
    finish: Finish
    timings: Timings
    logprobs: tuple[TokenLogprobs, ...] = ()


class MeshClient:
    """A connection to a mesh, for use on one event loop. It connects with the first call.

    >>> async with MeshClient("127.0.0.1:50051") as client:
    ...     completion = await client.generate([Message("user", "Why is the sky blue?")], temperature=0)
    """

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        """``address``: HOST:PORT, or any gRPC target such as ``ipv4:10.0.0.1:50051,10.0.0.2:50051``.

        Calls are spread over several addresses in turn; an address that cannot be reached gets none.
        """
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._inference: inference_pb2_grpc.InferenceAsyncStub = inference_pb2_grpc.InferenceStub(self._channel)
        self._mesh: mesh_pb2_grpc.MeshAsyncStub = mesh_pb2_grpc.MeshStub(self._channel)
        self._only_model: str | None = None
        self._is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection. Calls in progress and later calls raise RequestAborted."""
        self._is_closed = True
        await self._channel.close()

    async def stream(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        allowed_token_ids: Sequence[int] | None = None,
        seed: int | None = None,
        num_sequences: int = 1,
        stop_strings: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        include_stop_strings: bool = False,
        ignore_eos: bool = False,
        truncate_prompt_tokens: int | None = None,
        skip_special_tokens: bool = True,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        cache_salt: str = "",
        bypass_prefix_cache: bool = False,
        kv_swap_format: KvFormat | None = None,
        priority: int = 0,
        expected_output_tokens: int | None = None,
        explain_scheduling: bool = False,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Streams the output as it is generated. Closing the generator aborts the request.

        ``model`` may be omitted if the mesh serves only one. Where ``temperature``, ``top_k``, ``top_p``, ``min_p`` or
        ``repetition_penalty`` is None, the model's own default applies. ``num_sequences`` outputs are generated for one
        prompt, which is computed once; ``Delta.index`` names the sequence. ``logprobs`` and ``prompt_logprobs`` are the
        number of most likely candidates reported per token. Requests share cached prefixes only if their ``cache_salt``
        is the same. ``kv_swap_format`` is the format of swapped-out KV; None: as configured. ``priority``: lower is
        sooner. ``expected_output_tokens`` is the caller's own estimate; its weight depends on how accurate earlier
        estimates with the same ``cache_salt`` were. ``explain_scheduling`` fills ``prompt.scheduling``. ``timeout_s``
        is the deadline for the complete output.

        Raises InvalidRequest, ModelNotFound, Overloaded, DeadlineExceeded, Unavailable, RequestAborted, InternalError.
        """
        loop = asyncio.get_running_loop()
        started_at_s = loop.time()
        if isinstance(prompt, bytes | bytearray):
            raise InvalidRequest("prompt", "is bytes; text, token ids or a list of Message is needed")
        if timeout_s is not None and not math.isfinite(timeout_s):
            raise InvalidRequest("timeout_s", f"is {timeout_s}; a finite number of seconds, or None for no deadline")
        _check_numbers(
            _UINT32,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            top_k=top_k,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            truncate_prompt_tokens=truncate_prompt_tokens,
        )
        _check_numbers(range(1, 1 << 32), num_sequences=num_sequences, expected_output_tokens=expected_output_tokens)
        _check_numbers(range(1 << 63), seed=seed)
        if allowed_token_ids is not None and not len(allowed_token_ids):
            raise InvalidRequest("allowed_token_ids", "is empty: no token could be sampled; None allows all")
        _check_numbers(range(-(1 << 31), 1 << 31), priority=priority)
        for name, ids in (("allowed_token_ids", allowed_token_ids or ()), ("stop_token_ids", stop_token_ids)):
            for token_id in ids:
                _check_numbers(_UINT32, **{name: token_id})
        model = model or await self._default_model(timeout_s)
        if timeout_s is not None:
            timeout_s = max(0.0, timeout_s - (loop.time() - started_at_s))
        try:
            request = inference_pb2.GenerateRequest(
                request_id=request_id,
                model=model,
                temperature=temperature,
                sampling=inference_pb2.SamplingOptions(
                    num_sequences=num_sequences, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
                ),
                decoding=inference_pb2.DecodingOptions(
                    presence_penalty=presence_penalty,
                    frequency_penalty=frequency_penalty,
                    repetition_penalty=repetition_penalty,
                    logit_bias=logit_bias,
                    allowed_token_ids=allowed_token_ids,
                ),
                stopping=inference_pb2.StoppingOptions(
                    max_new_tokens=max_new_tokens,
                    min_new_tokens=min_new_tokens,
                    stop_token_ids=stop_token_ids,
                    stop_strings=(stop_strings,) if isinstance(stop_strings, str) else stop_strings,
                    include_stop_strings=include_stop_strings,
                    ignore_eos=ignore_eos,
                ),
                response=inference_pb2.ResponseOptions(
                    output_token_ids=True,
                    prompt_token_ids=prompt_logprobs is not None,
                    skip_special_tokens=skip_special_tokens,
                    output_logprobs=logprobs is not None,
                    output_candidates=_candidates(logprobs),
                    prompt_logprobs=prompt_logprobs is not None,
                    prompt_candidates=_candidates(prompt_logprobs),
                    scheduling=explain_scheduling,
                ),
                kv=inference_pb2.KvOptions(
                    cache_salt=cache_salt,
                    bypass_prefix_cache=bypass_prefix_cache,
                    swap_format=_swap_format(kv_swap_format),
                ),
                truncate_prompt_tokens=truncate_prompt_tokens,
                priority=priority,
                expected_output_tokens=expected_output_tokens,
            )
            _set_prompt(request, prompt)
        except (TypeError, ValueError) as error:  # a value that the wire cannot carry
            raise InvalidRequest("request", str(error)) from error
        try:
            async with aclosing(self.stream_request(request, timeout_s)) as responses:
                async for response in responses:
                    yield _delta(response, logprobs or 0, prompt_logprobs or 0)
        except ModelNotFound:
            self._only_model = None  # the mesh at this address may have been replaced
            raise

    async def generate(self, prompt: Prompt, **options: Any) -> Completion:
        """Returns the complete output. Takes the options of `stream` and raises the same errors."""
        if options.get("num_sequences", 1) != 1:
            raise InvalidRequest("num_sequences", "generate returns one output; use generate_many for several")
        (completion,) = await self.generate_many(prompt, **options)
        return completion

    async def generate_many(self, prompt: Prompt, **options: Any) -> tuple[Completion, ...]:
        """Returns all ``num_sequences`` complete outputs, in order of their index. See `stream`."""
        deltas = [delta async for delta in self.stream(prompt, **options)]
        facts, timings = (deltas[0].prompt, deltas[-1].timings) if deltas else (None, None)
        if facts is None or timings is None:
            raise InternalError("the mesh ended the stream without a finish")
        sequences: dict[int, list[Delta]] = {}
        for delta in deltas:
            sequences.setdefault(delta.index, []).append(delta)
        return tuple(_completion(sequences[index], facts, timings) for index in sorted(sequences))

    async def stream_request(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None = None
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """Calls GenerateStream with a request message that the caller has built; no field is checked."""
        with self._mesh_errors():
            call = self._inference.GenerateStream(request, timeout=timeout_s)
            try:
                async for response in call:
                    yield response
            finally:
                call.cancel()

    async def list_models(self, timeout_s: float | None = None) -> list[mesh_pb2.ModelInfo]:
        """Returns the models that the mesh serves."""
        with self._mesh_errors():
            response = await self._mesh.ListModels(mesh_pb2.ListModelsRequest(), timeout=timeout_s)
        return list(response.models)

    async def status(self, timeout_s: float | None = 5.0) -> mesh_pb2.GetStatusResponse:
        """Returns the state of models, units and processes, as the router that is called sees it."""
        with self._mesh_errors():
            return await self._mesh.GetStatus(mesh_pb2.GetStatusRequest(), timeout=timeout_s)

    async def _default_model(self, timeout_s: float | None) -> str:
        if self._only_model is None:
            names = [model.name for model in await self.list_models(timeout_s)]
            if not names:
                raise InvalidRequest("model", "the mesh serves no model")
            if len(names) > 1:
                raise InvalidRequest("model", f"the mesh serves several; choose one of {', '.join(names)}")
            self._only_model = names[0]
        return self._only_model

    @contextmanager
    def _mesh_errors(self) -> Iterator[None]:
        """Maps gRPC errors to those of the mesh."""
        if self._is_closed:
            raise RequestAborted("the client is closed")
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._is_closed or (task is not None and task.cancelling()):
                raise
            raise RequestAborted("the client was closed") from None  # closing a channel cancels its calls locally


def _check_numbers(allowed: range, **numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and (not isinstance(number, int) or number not in allowed):
            raise InvalidRequest(name, f"is {number!r}; a whole number from {allowed[0]} to {allowed[-1]}")


def _swap_format(kv_format: KvFormat | None) -> inference_pb2.KvSwapFormat.ValueType:
    known: dict[KvFormat | None, inference_pb2.KvSwapFormat.ValueType] = {
        None: inference_pb2.KV_SWAP_FORMAT_UNSPECIFIED,
        "raw": inference_pb2.KV_SWAP_FORMAT_RAW,
        "int8": inference_pb2.KV_SWAP_FORMAT_INT8,
    }
    if kv_format not in known:
        raise InvalidRequest("kv_swap_format", f"is {kv_format!r}; raw or int8")
    return known[kv_format]


def _set_prompt(request: inference_pb2.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    elif all(isinstance(part, Message) for part in prompt) and len(prompt):
        turns = [inference_pb2.ChatMessage(role=m.role, content=m.content) for m in prompt if isinstance(m, Message)]
        request.chat.messages.extend(turns)
    else:
        request.token_ids.ids.extend(part for part in prompt if isinstance(part, int))
        if len(request.token_ids.ids) != len(prompt):
            raise InvalidRequest("prompt", "is neither text, token ids nor a list of Message")
        request.token_ids.SetInParent()


def _completion(deltas: Sequence[Delta], prompt: PromptFacts, timings: Timings) -> Completion:
    finish = deltas[-1].finish
    if finish is None:
        raise InternalError("the mesh ended the stream without a finish")
    return Completion(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        prompt=prompt,
        finish=finish,
        timings=timings,
        logprobs=tuple(position for delta in deltas for position in delta.logprobs),
    )


def _candidates(count: int | None) -> inference_pb2.CandidateTokens | None:
    return inference_pb2.CandidateTokens(top_n=count) if count else None


def _delta(response: inference_pb2.GenerateResponse, num_candidates: int, num_prompt_candidates: int) -> Delta:
    """``num_candidates``: how many were requested for each output token, and for each token of the prompt."""
    outputs, wire, prompt, timings = response.outputs, response.timings, None, None
    if response.HasField("prompt_info"):
        prompt = _prompt_facts(response, num_prompt_candidates)
    if response.HasField("timings"):
        timings = Timings(wire.queue_s, wire.ttft_s, wire.e2e_s, wire.num_restarts, wire.router_s)
    return Delta(
        index=outputs.index,
        text=outputs.text,
        token_ids=tuple(outputs.token_ids),
        num_tokens=outputs.num_tokens,
        logprobs=_logprobs(outputs, num_candidates),
        prompt=prompt,
        finish=_finish(outputs.finish_info) if outputs.HasField("finish_info") else None,
        timings=timings,
    )


def _prompt_facts(response: inference_pb2.GenerateResponse, num_candidates: int) -> PromptFacts:
    info, wire = response.prompt_info, response.scheduling
    scheduling = None
    if response.HasField("scheduling"):
        scheduling = Scheduling(**{field.name: getattr(wire, field.name) for field in fields(Scheduling)})
    return PromptFacts(
        num_tokens=info.num_prompt_tokens,
        num_cached_tokens=info.num_cached_tokens,
        seed=info.seed,
        logprobs=_logprobs(info, num_candidates)[1:],  # the first token has none
        predicted_output_tokens=info.predicted_output_tokens if info.HasField("predicted_output_tokens") else None,
        scheduling=scheduling,
    )


def _logprobs(
    columns: inference_pb2.SequenceOutput | inference_pb2.PromptInfo, num_candidates: int
) -> tuple[TokenLogprobs, ...]:
    """One entry for each token. The wire leaves the token itself out of its candidates."""
    if not columns.logprobs:
        return ()
    entries = zip(columns.token_ids, columns.logprobs, columns.ranks, columns.candidate_tokens, strict=True)
    return tuple(
        _token_logprobs(Candidate(token_id, logprob, rank), candidates, num_candidates)
        for token_id, logprob, rank, candidates in entries
    )


def _token_logprobs(chosen: Candidate, others: inference_pb2.CandidateTokenInfo, num_candidates: int) -> TokenLogprobs:
    top = [Candidate(one.id, one.logprob, one.rank) for one in others.tokens]
    if len(top) < num_candidates:  # the token is one of the candidates: its rank is the one that is missing
        index = next((index for index, one in enumerate(top) if one.rank != index + 1), len(top))
        top.insert(index, Candidate(chosen.token_id, chosen.logprob, index + 1))
    return TokenLogprobs(chosen, tuple(top))


def _finish(wire: inference_pb2.FinishInfo) -> Finish:
    kind = wire.WhichOneof("stop_reason")
    stopped_by = getattr(wire, kind) if kind else None
    reasons: dict[int, Literal["length", "stop", "aborted"]] = {1: "length", 2: "stop", 3: "aborted"}
    if wire.finish_reason not in reasons:
        raise InternalError(f"the mesh reports the unknown finish_reason {wire.finish_reason}")
    return Finish(reasons[wire.finish_reason], wire.num_output_tokens, stopped_by)


__all__ = [
    "Candidate",
    "Completion",
    "Delta",
    "Finish",
    "MeshClient",
    "Message",
    "Prompt",
    "PromptFacts",
    "Scheduling",
    "Timings",
    "TokenLogprobs",
]
