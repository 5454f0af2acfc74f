"""Between the wire's messages and the mesh's own values."""

from __future__ import annotations

from muxmesh.internal.v1 import kvstore_pb2, request_pb2
from muxmesh.types import (
    EngineRequest,
    Finish,
    FinishReason,
    Lease,
    LeaseRef,
    LengthPrediction,
    OrderKey,
    Sampling,
    Stopping,
)

_FINISH = {
    FinishReason.LENGTH: request_pb2.FINISH_REASON_LENGTH,
    FinishReason.STOP_TOKEN: request_pb2.FINISH_REASON_STOP_TOKEN,
    FinishReason.EOS: request_pb2.FINISH_REASON_EOS,
}
_FINISH_BACK = {number: reason for reason, number in _FINISH.items()}


def request_to_wire(request: EngineRequest) -> request_pb2.EngineRequest:
    """See `request_from_wire`."""
    sampling, stopping, prediction = request.sampling, request.stopping, request.prediction
    wire = request_pb2.EngineRequest(
        request_id=request.request_id,
        model=request.model,
        prompt_token_ids=request.prompt_token_ids,
        resume_token_ids=request.resume_token_ids,
        sampling=request_pb2.Sampling(
            temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, seed=sampling.seed
        ),
        stopping=request_pb2.Stopping(
            max_new_tokens=stopping.max_new_tokens,
            min_new_tokens=stopping.min_new_tokens,
            stop_token_ids=sorted(stopping.stop_token_ids),
            eos_token_ids=sorted(stopping.eos_token_ids),
        ),
        priority=request.order.priority,
        arrived_at_unix_s=request.order.arrived_at_s,
    )
    if prediction is not None:
        wire.prediction.p50_tokens = prediction.p50_tokens
        wire.prediction.p90_tokens = prediction.p90_tokens
    return wire


def request_from_wire(wire: request_pb2.EngineRequest) -> EngineRequest:
    """The request that `request_to_wire` sent."""
    sampling, stopping = wire.sampling, wire.stopping
    prediction = None
    if wire.HasField("prediction"):
        prediction = LengthPrediction(wire.prediction.p50_tokens, wire.prediction.p90_tokens)
    return EngineRequest(
        request_id=wire.request_id,
        model=wire.model,
        prompt_token_ids=tuple(wire.prompt_token_ids),
        sampling=Sampling(sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed),
        stopping=Stopping(
            stopping.max_new_tokens,
            stopping.min_new_tokens,
            frozenset(stopping.stop_token_ids),
            frozenset(stopping.eos_token_ids),
        ),
        order=OrderKey(wire.priority, wire.arrived_at_unix_s),
        resume_token_ids=tuple(wire.resume_token_ids),
        prediction=prediction,
    )


def finish_to_wire(finish: Finish) -> request_pb2.Finish:
    """See `finish_from_wire`."""
    return request_pb2.Finish(reason=_FINISH[finish.reason], token_id=finish.token_id or 0)


def finish_from_wire(wire: request_pb2.Finish) -> Finish:
    """The end that `finish_to_wire` sent."""
    reason = _FINISH_BACK[wire.reason]
    return Finish(reason, None if reason is FinishReason.LENGTH else wire.token_id)


def ref_to_wire(ref: LeaseRef) -> request_pb2.LeaseRef:
    """See `ref_from_wire`."""
    return request_pb2.LeaseRef(lease_id=ref.lease_id, epoch=ref.epoch)


def ref_from_wire(wire: request_pb2.LeaseRef) -> LeaseRef:
    """The reference that `ref_to_wire` sent."""
    return LeaseRef(wire.lease_id, wire.epoch)


def lease_to_wire(lease: Lease) -> kvstore_pb2.Lease:
    """See `lease_from_wire`."""
    return kvstore_pb2.Lease(
        ref=ref_to_wire(lease.ref),
        model=lease.model,
        block_ids=lease.block_ids,
        num_computed_tokens=lease.num_computed_tokens,
        sampled_token_ids=lease.sampled_token_ids,
        handoff=lease.handoff,
    )


def lease_from_wire(wire: kvstore_pb2.Lease) -> Lease:
    """The lease that `lease_to_wire` sent."""
    return Lease(
        ref=ref_from_wire(wire.ref),
        model=wire.model,
        block_ids=tuple(wire.block_ids),
        num_computed_tokens=wire.num_computed_tokens,
        sampled_token_ids=tuple(wire.sampled_token_ids),
        handoff=wire.handoff,
    )
