"""The Inference service: passes requests to the pipeline and sends its deltas. Owns request ids."""

from __future__ import annotations

import asyncio
import math
import random
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import grpc

from muxmesh.clock import Clock
from muxmesh.v1 import inference_pb2, inference_pb2_grpc
from router.api.generate_messages import message_from_delta, request_from_message
from router.api.request_observer import RequestObserver
from router.api.tokenize_messages import message_from_tokenized, prompt_from_message
from router.api.unknown_fields import refuse_unknown_fields
from router.caller import caller
from router.pipeline import GenerationPipeline
from router.request_record import RequestRecord

_MAX_LOGPROBS_ON_LOOP = 128
"""Positions of a prompt whose log-probabilities are converted at once: each takes up to 0.1 ms, with its candidates."""

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Generate and GenerateStream, Tokenize and Detokenize."""

    def __init__(
        self, pipeline: GenerationPipeline, clock: Clock, rng: random.Random, observer: RequestObserver
    ) -> None:
        """``observer`` is told of each request of GenerateStream and Generate."""
        self._pipeline = pipeline
        self._observer = observer
        self._clock = clock
        self._rng = rng

    async def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """See the proto. Sends the request id as the initial metadata `x-request-id`."""
        arrived_at_s = self._clock.monotonic_s()
        request_id = _metadata_value(context, "x-request-id") or f"{self._rng.getrandbits(64):016x}"
        with self._observer.observed(RequestRecord(request_id, arrived_at_s)) as record:
            ticket = _metadata_value(context, "x-muxmesh-ticket")
            left_s = context.time_remaining()
            deadline_s = math.inf if left_s is None else arrived_at_s + left_s
            generation = replace(
                request_from_message(request, request_id), tenant=caller(), ticket=ticket, deadline_s=deadline_s
            )
            record.tenant = generation.tenant.name
            record.request_id = generation.request_id
            record.model = self._pipeline.model_name(generation.model)
            self._pipeline.validate(generation)
            await context.send_initial_metadata((("x-request-id", generation.request_id),))
            texts = self._pipeline.token_texts(generation.model)
            async with aclosing(await self._pipeline.start(generation, record)) as deltas:
                async for delta in deltas:
                    if delta.prompt is not None and len(delta.prompt.logprobs) > _MAX_LOGPROBS_ON_LOOP:
                        yield await asyncio.to_thread(message_from_delta, delta, generation.output, texts)
                    else:
                        yield message_from_delta(delta, generation.output, texts)

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        """See the proto. Merges the messages of `GenerateStream`."""
        whole = inference_pb2.GenerateResponse()
        outputs: dict[int, inference_pb2.SequenceOutput] = {}
        texts: defaultdict[int, list[str]] = defaultdict(list)
        async with aclosing(self.GenerateStream(request, context)) as parts:
            async for part in parts:
                output = outputs.setdefault(part.outputs.index, inference_pb2.SequenceOutput())
                num_tokens = output.num_tokens + part.outputs.num_tokens
                texts[part.outputs.index].append(part.outputs.text)
                part.outputs.ClearField("text")
                output.MergeFrom(part.outputs)
                output.num_tokens = num_tokens
                part.ClearField("outputs")
                whole.MergeFrom(part)
        for index, output in outputs.items():
            output.text = "".join(texts[index])
        whole.outputs.CopyFrom(outputs[0])
        if len(outputs) > 1:
            whole.all_outputs.extend(outputs[index] for index in sorted(outputs))
        return whole

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        """See the proto."""
        prompt = prompt_from_message(request)
        adds = request.add_special_tokens if request.HasField("add_special_tokens") else None
        return message_from_tokenized(await self._pipeline.tokenize(request.model, prompt, adds, request.token_texts))

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        """See the proto."""
        refuse_unknown_fields(request)
        text = await self._pipeline.detokenize(request.model, request.token_ids, request.skip_special_tokens)
        return inference_pb2.DetokenizeResponse(text=text)


def _metadata_value(context: Context, name: str) -> str:
    """A value in the call's metadata, or an empty string."""
    for key, value in context.invocation_metadata() or ():
        if key == name:
            return value if isinstance(value, str) else value.decode(errors="replace")
    return ""
