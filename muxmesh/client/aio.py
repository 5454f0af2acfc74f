"""The async client. Errors are those of `muxmesh.errors`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Literal, Self

import grpc

from muxmesh.errors import InternalError, InvalidRequest, ModelNotFound
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
    """One turn of a conversation. ``role``: system, user or assistant."""

    role: str
    content: str


Prompt = str | Sequence[int] | Sequence[Message]
"""Plain text, token ids, or a conversation for the model's chat template."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of an answer. ``stopped_by``: the token id or stop string that ended it; None for length."""

    reason: Literal["length", "stop", "aborted"]
    num_output_tokens: int
    stopped_by: int | str | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """Measured at the router, in seconds from arrival. ``num_restarts``: further attempts, after a worker
    was lost or the KV pool was full. ``router_s``: the part of ``ttft_s`` that the router itself took.
    """

    queue_s: float
    ttft_s: float
    e2e_s: float
    num_restarts: int
    router_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Scheduling:
    """Why a request was served when it was. Lengths in tokens, times in seconds; see SchedulingInfo in the proto.

    ``source``: where the expected length comes from. ``decision`` counts what the unit let in; ``num_overtaken``
    requests for the same model had come before and waited on.
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
    """What the mesh knows of a prompt. ``seed`` repeats the answer; ``num_cached_tokens`` were in the prefix cache.

    ``logprobs`` belong to its second token and those after it, and ``scheduling`` tells of the order, if they were
    asked for. ``predicted_output_tokens`` is None if the mesh made no guess.
    """

    num_tokens: int
    num_cached_tokens: int
    seed: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    predicted_output_tokens: int | None = None
    scheduling: Scheduling | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of answer ``index``. ``prompt`` comes in the first delta of all, ``finish`` in an answer's last.

    ``timings`` come in the last of all. ``logprobs`` has an entry for each token if they were asked for.
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
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    prompt: PromptFacts
    finish: Finish
    timings: Timings
    logprobs: tuple[TokenLogprobs, ...] = ()


class MeshClient:
    """A connection to a mesh, for use on one event loop.

    >>> async with MeshClient("127.0.0.1:50051") as client:
    ...     answer = await client.generate([Message("user", "Why is the sky blue?")], temperature=0)
    """

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        """``address``: HOST:PORT, or any gRPC target such as ``ipv4:10.0.0.1:50051,10.0.0.2:50051``."""
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._inference: inference_pb2_grpc.InferenceAsyncStub = inference_pb2_grpc.InferenceStub(self._channel)
        self._mesh: mesh_pb2_grpc.MeshAsyncStub = mesh_pb2_grpc.MeshStub(self._channel)
        self._only_model: str | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; running streams end with RequestAborted."""
        await self._channel.close()

    async def stream(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float | None = None,
        min_p: float | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
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
        """The answer as it is made. Closing the generator aborts the request.

        ``model`` may be left out if the mesh serves only one. ``num_sequences``: so many answers to the prompt, which
        is computed once; each delta says by ``index`` to which it belongs. ``logprobs`` and ``prompt_logprobs``: with
        so many of the likeliest candidates. Requests share cached prefixes only under the same ``cache_salt``.
        ``kv_swap_format``: how the KV is kept if the answer has to give way to others; None: as configured.
        ``priority``: lower is sooner. ``expected_output_tokens``: your own estimate, which counts as far as earlier
        ones under the same ``cache_salt`` were right. ``explain_scheduling`` fills ``prompt.scheduling``.
        ``timeout_s`` is the deadline of the whole answer.

        Raises InvalidRequest, ModelNotFound, Overloaded, DeadlineExceeded, Unavailable.
        """
        clock = asyncio.get_running_loop()
        asked_at_s = clock.time()
        if isinstance(prompt, bytes | bytearray):
            raise InvalidRequest("prompt", "is bytes; text, token ids or a list of Message is needed")
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
        _check_numbers(range(1 << 64), seed=seed)
        _check_numbers(range(-(1 << 31), 1 << 31), priority=priority)
        for name, ids in (("allowed_token_ids", allowed_token_ids or ()), ("stop_token_ids", stop_token_ids)):
            for token_id in ids:
                _check_numbers(_UINT32, **{name: token_id})
        model = model or await self._default_model(timeout_s)
        if timeout_s is not None:
            timeout_s = max(0.0, timeout_s - (clock.time() - asked_at_s))
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
                    allowed_token_ids=None
                    if allowed_token_ids is None
                    else inference_pb2.TokenIds(ids=allowed_token_ids),
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
                    skip_special_tokens=skip_special_tokens,
                    output_logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
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
        except (TypeError, ValueError) as error:  # a number or a text that the wire cannot carry
            raise InvalidRequest("request", str(error)) from error
        try:
            async with aclosing(self.stream_request(request, timeout_s)) as responses:
                async for response in responses:
                    yield _delta(response)
        except ModelNotFound:
            self._only_model = None  # another mesh may be there now
            raise

    async def generate(self, prompt: Prompt, **options: Any) -> Completion:
        """The whole answer. Takes the options of `stream` and raises what it raises."""
        if options.get("num_sequences", 1) != 1:
            raise InvalidRequest("num_sequences", "generate gives one answer; generate_many gives several")
        (completion,) = await self.generate_many(prompt, **options)
        return completion

    async def generate_many(self, prompt: Prompt, **options: Any) -> tuple[Completion, ...]:
        """Every answer of `stream` with ``num_sequences``, whole, in order of index."""
        deltas = [delta async for delta in self.stream(prompt, **options)]
        facts, timings = (deltas[0].prompt, deltas[-1].timings) if deltas else (None, None)
        if facts is None or timings is None:
            raise InternalError("the mesh ended the stream without a finish")
        answers = [[delta for delta in deltas if delta.index == index] for index in sorted({d.index for d in deltas})]
        return tuple(_completion(answer, facts, timings) for answer in answers)

    async def stream_request(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None = None
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """GenerateStream with a request message of your own."""
        call = self._inference.GenerateStream(request, timeout=timeout_s)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()

    async def list_models(self, timeout_s: float | None = None) -> list[mesh_pb2.ModelInfo]:
        """What the mesh serves."""
        response = await self._ask(self._mesh.ListModels(mesh_pb2.ListModelsRequest(), timeout=timeout_s))
        return list(response.models)

    async def status(self, timeout_s: float | None = 5.0) -> mesh_pb2.GetStatusResponse:
        """How the mesh is."""
        response: mesh_pb2.GetStatusResponse = await self._ask(
            self._mesh.GetStatus(mesh_pb2.GetStatusRequest(), timeout=timeout_s)
        )
        return response

    async def _default_model(self, timeout_s: float | None) -> str:
        if self._only_model is None:
            names = [model.name for model in await self.list_models(timeout_s)]
            if not names:
                raise InvalidRequest("model", "the mesh serves none")
            if len(names) > 1:
                raise InvalidRequest("model", f"the mesh serves several; choose one of {', '.join(names)}")
            self._only_model = names[0]
        return self._only_model

    @staticmethod
    async def _ask(call: Any) -> Any:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None


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
        logprobs=tuple(place for delta in deltas for place in delta.logprobs),
    )


def _delta(response: inference_pb2.GenerateResponse) -> Delta:
    outputs, wire, prompt, timings = response.outputs, response.timings, None, None
    if response.HasField("prompt_info"):
        prompt = _prompt_facts(response)
    if response.HasField("timings"):
        timings = Timings(wire.queue_s, wire.ttft_s, wire.e2e_s, wire.num_restarts, wire.router_s)
    return Delta(
        index=outputs.index,
        text=outputs.text,
        token_ids=tuple(outputs.token_ids),
        num_tokens=outputs.num_tokens,
        logprobs=_logprobs(outputs.token_logprobs),
        prompt=prompt,
        finish=_finish(outputs.finish_info) if outputs.HasField("finish_info") else None,
        timings=timings,
    )


def _prompt_facts(response: inference_pb2.GenerateResponse) -> PromptFacts:
    info, wire = response.prompt_info, response.scheduling
    scheduling = None
    if response.HasField("scheduling"):
        scheduling = Scheduling(**{field.name: getattr(wire, field.name) for field in fields(Scheduling)})
    return PromptFacts(
        num_tokens=info.num_prompt_tokens,
        num_cached_tokens=info.num_cached_tokens,
        seed=info.seed,
        logprobs=_logprobs(info.token_logprobs),
        predicted_output_tokens=info.predicted_output_tokens if info.HasField("predicted_output_tokens") else None,
        scheduling=scheduling,
    )


def _logprobs(places: Iterable[inference_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    def candidate(wire: inference_pb2.TokenLogprob) -> Candidate:
        return Candidate(wire.token_id, wire.logprob, wire.rank)

    return tuple(TokenLogprobs(candidate(place.chosen), tuple(map(candidate, place.top))) for place in places)


def _finish(wire: inference_pb2.FinishInfo) -> Finish:
    kind = wire.WhichOneof("stop_reason")
    stopped_by = getattr(wire, kind) if kind else None
    reasons: dict[int, Literal["length", "stop", "aborted"]] = {1: "length", 2: "stop", 3: "aborted"}
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
