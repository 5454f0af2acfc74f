"""Conversion between the internal protobuf messages and the values in `muxmesh.types`. Validates nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from muxmesh.block_hashes import join_hashes, split_hashes
from muxmesh.execution import Execution, PreemptionReason
from muxmesh.internal.v1 import kvstore_pb2, request_pb2
from muxmesh.step_cost import StepCost
from muxmesh.types import (
    SOLE_TENANT,
    Candidate,
    EngineRequest,
    Finish,
    FinishReason,
    KvDemand,
    KvFormat,
    Lease,
    LeaseRef,
    LengthPrediction,
    QueuedRequest,
    Sampling,
    SchedulingState,
    SloTargets,
    Stopping,
    TenantStanding,
    TokenLogprobs,
    Waits,
)

_FINISH = {
    FinishReason.LENGTH: request_pb2.FINISH_REASON_LENGTH,
    FinishReason.STOP_TOKEN: request_pb2.FINISH_REASON_STOP_TOKEN,
    FinishReason.EOS: request_pb2.FINISH_REASON_EOS,
}
_FINISH_REASONS = {number: reason for reason, number in _FINISH.items()}
_KV_FORMATS: dict[str, KvFormat] = {"raw": "raw", "int8": "int8"}


def request_to_wire(request: EngineRequest) -> request_pb2.EngineRequest:
    """Encodes an engine request."""
    sampling, stopping, prediction = request.sampling, request.stopping, request.prediction
    wire = request_pb2.EngineRequest(
        request_id=request.request_id,
        model=request.model,
        prompt_token_ids=request.prompt_token_ids,
        resume_token_ids=request.resume_token_ids,
        sampling=_sampling_to_wire(sampling),
        stopping=request_pb2.Stopping(
            max_new_tokens=stopping.max_new_tokens,
            min_new_tokens=stopping.min_new_tokens,
            stop_token_ids=sorted(stopping.stop_token_ids),
            eos_token_ids=sorted(stopping.eos_token_ids),
        ),
        scheduling=scheduling_to_wire(request.scheduling),
        sequence_index=request.sequence_index,
        tenant=request.tenant,
        tenant_weight=request.tenant_weight,
        cache_salt=request.cache_salt,
        bypass_prefix_cache=request.bypass_prefix_cache,
        kv_swap_format=request.kv_swap_format or "",
    )
    if prediction is not None:
        wire.prediction.p50_tokens = prediction.p50_tokens
        wire.prediction.p90_tokens = prediction.p90_tokens
    if (slo := request.slo) is not None:
        wire.slo.CopyFrom(request_pb2.SloTargets(ttft_s=slo.ttft_s, tpot_s=slo.tpot_s, waited_s=slo.waited_s))
    return wire


def request_from_wire(wire: request_pb2.EngineRequest) -> EngineRequest:
    """Decodes an engine request."""
    sampling, stopping = wire.sampling, wire.stopping
    prediction = None
    if wire.HasField("prediction"):
        prediction = LengthPrediction(wire.prediction.p50_tokens, wire.prediction.p90_tokens)
    return EngineRequest(
        request_id=wire.request_id,
        model=wire.model,
        prompt_token_ids=tuple(wire.prompt_token_ids),
        sampling=_sampling_from_wire(sampling),
        stopping=Stopping(
            stopping.max_new_tokens,
            stopping.min_new_tokens,
            frozenset(stopping.stop_token_ids),
            frozenset(stopping.eos_token_ids),
        ),
        scheduling=scheduling_from_wire(wire.scheduling),
        resume_token_ids=tuple(wire.resume_token_ids),
        prediction=prediction,
        sequence_index=wire.sequence_index,
        tenant=wire.tenant,
        cache_salt=wire.cache_salt,
        bypass_prefix_cache=wire.bypass_prefix_cache,
        kv_swap_format=_KV_FORMATS.get(wire.kv_swap_format),
        slo=_slo_from_wire(wire.slo) if wire.HasField("slo") else None,
        tenant_weight=_weight_from_wire(wire.tenant_weight),
    )


def _slo_from_wire(wire: request_pb2.SloTargets) -> SloTargets:
    ttft_s = wire.ttft_s if wire.HasField("ttft_s") else None
    return SloTargets(ttft_s, wire.tpot_s if wire.HasField("tpot_s") else None, wire.waited_s)


def scheduling_to_wire(scheduling: SchedulingState) -> request_pb2.SchedulingState:
    """Encodes a scheduling state."""
    return request_pb2.SchedulingState(
        priority=scheduling.priority,
        arrived_at_unix_s=scheduling.arrived_at_s,
        prefill_s=scheduling.prefill_s,
        decode_s=scheduling.decode_s,
        served_s=scheduling.served_s,
        mean_work_s=scheduling.mean_work_s,
        num_preemptions=scheduling.num_preemptions,
        queued_per_slot=scheduling.queued_per_slot,
        longest_lead_s=scheduling.longest_lead_s,
        standing=standing_to_wire(scheduling.standing),
    )


def scheduling_from_wire(wire: request_pb2.SchedulingState) -> SchedulingState:
    """Decodes a scheduling state."""
    return SchedulingState(
        wire.priority,
        wire.arrived_at_unix_s,
        wire.prefill_s,
        wire.decode_s,
        wire.served_s,
        wire.mean_work_s,
        wire.num_preemptions,
        wire.queued_per_slot,
        wire.longest_lead_s,
        standing_from_wire(wire),
    )


def standing_to_wire(standing: TenantStanding) -> request_pb2.TenantStanding | None:
    """Encodes the standing of a tenant; None while there are no others."""
    if not standing.has_rivals:
        return None
    return request_pb2.TenantStanding(
        group=standing.group,
        best_priority=standing.best_priority,
        has_overdue_lane=standing.has_overdue_lane,
        tenant_number=standing.tenant_number,
    )


def standing_from_wire(wire: request_pb2.SchedulingState | kvstore_pb2.LeaseStandings) -> TenantStanding:
    """Decodes the field ``standing``, which is not set while a tenant has no others beside it."""
    if not wire.HasField("standing"):
        return SOLE_TENANT
    standing = wire.standing
    return TenantStanding(
        standing.group, standing.best_priority, True, standing.has_overdue_lane, standing.tenant_number
    )


def _weight_from_wire(weight: float) -> float:
    """The weight of a tenant; 1 if it is not set or none."""
    return weight if 0 < weight < math.inf else 1.0


def waits_to_wire(waits: Waits) -> kvstore_pb2.Waits:
    """Encodes waits for admission; a unit knows nothing of the device."""
    return kvstore_pb2.Waits(slot_s=waits.slot_s, kv_s=waits.kv_s, order_s=waits.order_s, worker_s=waits.worker_s)


def waits_from_wire(wire: kvstore_pb2.Waits) -> Waits:
    """Decodes waits for admission."""
    return Waits(wire.slot_s, wire.kv_s, wire.order_s, wire.worker_s)


def demand_to_wire(demand: KvDemand) -> kvstore_pb2.KvDemand:
    """Encodes a KV demand."""
    return kvstore_pb2.KvDemand(
        num_tokens=demand.num_tokens,
        max_tokens=demand.max_tokens,
        block_hashes=join_hashes(demand.block_hashes),
        max_cached_tokens=demand.max_cached_tokens,
        num_known_tokens=demand.num_known_tokens,
    )


def demand_from_wire(wire: kvstore_pb2.KvDemand) -> KvDemand:
    """Decodes a KV demand."""
    hashes = split_hashes(wire.block_hashes)
    return KvDemand(wire.num_tokens, wire.max_tokens, hashes, wire.max_cached_tokens, wire.num_known_tokens)


def queued_to_wire(request: QueuedRequest) -> kvstore_pb2.QueuedRequest:
    """Encodes a queued request."""
    return kvstore_pb2.QueuedRequest(
        entry_id=request.entry_id,
        model=request.model,
        scheduling=scheduling_to_wire(request.scheduling),
        demand=demand_to_wire(request.demand),
        tenant=request.tenant,
        tenant_weight=request.tenant_weight,
    )


def queued_from_wire(wire: kvstore_pb2.QueuedRequest) -> QueuedRequest:
    """Decodes a queued request."""
    scheduling, demand = scheduling_from_wire(wire.scheduling), demand_from_wire(wire.demand)
    weight = _weight_from_wire(wire.tenant_weight)
    return QueuedRequest(wire.entry_id, wire.model, scheduling, demand, wire.tenant, weight)


def cost_to_wire(cost: StepCost) -> kvstore_pb2.StepCost:
    """Encodes a step cost."""
    return kvstore_pb2.StepCost(
        base_s=cost.base_s,
        per_token_s=cost.per_token_s,
        per_context_s=cost.per_context_s,
        mean_seqs=cost.mean_seqs,
        mean_context=cost.mean_context,
    )


def cost_from_wire(wire: kvstore_pb2.StepCost) -> StepCost:
    """Decodes a step cost."""
    return StepCost(wire.base_s, wire.per_token_s, wire.per_context_s, wire.mean_seqs, wire.mean_context)


def _sampling_to_wire(sampling: Sampling) -> request_pb2.Sampling:
    allowed = sampling.allowed_token_ids
    return request_pb2.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias),
        allowed=None if allowed is None else request_pb2.AllowedTokens(token_ids=allowed),
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
    )


def _sampling_from_wire(wire: request_pb2.Sampling) -> Sampling:
    return Sampling(
        temperature=wire.temperature,
        top_k=wire.top_k,
        top_p=wire.top_p,
        min_p=wire.min_p,
        seed=wire.seed,
        presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty,
        repetition_penalty=wire.repetition_penalty,
        logit_bias=tuple(sorted(wire.logit_bias.items())),
        allowed_token_ids=tuple(wire.allowed.token_ids) if wire.HasField("allowed") else None,
        logprobs=wire.logprobs if wire.HasField("logprobs") else None,
        prompt_logprobs=wire.prompt_logprobs if wire.HasField("prompt_logprobs") else None,
    )


def logprobs_to_wire(positions: Sequence[TokenLogprobs]) -> request_pb2.Logprobs:
    """Encodes log-probabilities as flat columns, with the number of candidates at each position."""
    flat = [candidate for position in positions for candidate in (position.chosen, *position.top)]
    return request_pb2.Logprobs(
        counts=[1 + len(position.top) for position in positions],
        token_ids=[candidate.token_id for candidate in flat],
        logprobs=[candidate.logprob for candidate in flat],
        ranks=[candidate.rank for candidate in flat],
    )


def logprobs_from_wire(wire: request_pb2.Logprobs) -> tuple[TokenLogprobs, ...]:
    """Decodes log-probabilities. Raises ValueError if the columns differ in length."""
    flat = (Candidate(*entry) for entry in zip(wire.token_ids, wire.logprobs, wire.ranks, strict=True))
    positions = (tuple(itertools.islice(flat, count)) for count in wire.counts)
    return tuple(TokenLogprobs(chosen, tuple(top)) for chosen, *top in positions)


def finish_to_wire(finish: Finish) -> request_pb2.Finish:
    """Encodes a finish."""
    return request_pb2.Finish(reason=_FINISH[finish.reason], token_id=finish.token_id or 0)


def finish_from_wire(wire: request_pb2.Finish) -> Finish:
    """Decodes a finish."""
    reason = _FINISH_REASONS[wire.reason]
    return Finish(reason, None if reason is FinishReason.LENGTH else wire.token_id)


def execution_to_wire(execution: Execution) -> request_pb2.Execution:
    """Encodes what became of a sequence in a decode worker."""
    return request_pb2.Execution(
        preemptions={str(reason): count for reason, count in execution.preemptions.items()},
        num_repredictions=execution.num_repredictions,
        num_recomputed=execution.num_recomputed,
        batched_s=execution.batched_s,
        paused_s=execution.paused_s,
        swapped_s=execution.swapped_s,
        is_overdue=execution.is_overdue,
    )


def execution_from_wire(wire: request_pb2.Execution) -> Execution:
    """Decodes what became of a sequence in a decode worker. Raises ValueError for an unknown reason."""
    return Execution(
        {PreemptionReason(reason): count for reason, count in wire.preemptions.items()},
        wire.num_repredictions,
        wire.num_recomputed,
        wire.batched_s,
        wire.paused_s,
        wire.swapped_s,
        is_overdue=wire.is_overdue,
    )


def ref_to_wire(ref: LeaseRef) -> request_pb2.LeaseRef:
    """Encodes a lease reference."""
    return request_pb2.LeaseRef(lease_id=ref.lease_id, epoch=ref.epoch)


def ref_from_wire(wire: request_pb2.LeaseRef) -> LeaseRef:
    """Decodes a lease reference."""
    return LeaseRef(wire.lease_id, wire.epoch)


def lease_to_wire(lease: Lease) -> kvstore_pb2.Lease:
    """Encodes a lease."""
    return kvstore_pb2.Lease(
        ref=ref_to_wire(lease.ref),
        model=lease.model,
        block_ids=lease.block_ids,
        num_computed_tokens=lease.num_computed_tokens,
        sampled_token_ids=lease.sampled_token_ids,
    )


def lease_from_wire(wire: kvstore_pb2.Lease) -> Lease:
    """Decodes a lease."""
    return Lease(
        ref=ref_from_wire(wire.ref),
        model=wire.model,
        block_ids=tuple(wire.block_ids),
        num_computed_tokens=wire.num_computed_tokens,
        sampled_token_ids=tuple(wire.sampled_token_ids),
    )
