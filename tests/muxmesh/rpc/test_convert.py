"""Values survive the conversion to messages and back."""

import dataclasses
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.execution import Execution, PreemptionReason
from muxmesh.internal.v1 import kvstore_pb2, request_pb2
from muxmesh.rpc import convert
from muxmesh.step_cost import StepCost
from muxmesh.types import (
    SOLE_TENANT,
    Candidate,
    EngineRequest,
    Finish,
    FinishReason,
    KvDemand,
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
)

TOKEN = st.integers(0, 2**32 - 1)
FLOAT = st.floats(0, 100, width=32)
IDS = st.lists(TOKEN, max_size=6).map(tuple)
SET = st.frozensets(TOKEN, max_size=4)
SAMPLING = st.builds(
    Sampling,
    FLOAT,
    TOKEN,
    FLOAT,
    FLOAT,
    st.integers(0, 2**64 - 1),
    FLOAT,
    FLOAT,
    FLOAT,
    st.dictionaries(TOKEN, FLOAT, max_size=4).map(lambda bias: tuple(sorted(bias.items()))),
    st.none() | IDS,
    st.none() | TOKEN,
    st.none() | TOKEN,
)
STATES = st.builds(SchedulingState, st.integers(-(2**31), 2**31 - 1), *[st.floats(0, 1e10)] * 5, TOKEN)
DEMANDS = st.builds(
    KvDemand, TOKEN, TOKEN, st.lists(st.binary(min_size=16, max_size=16), max_size=4).map(tuple), TOKEN, TOKEN
)
WEIGHTS = st.floats(0.01, 100)
QUEUED = st.builds(QueuedRequest, TOKEN, st.text(max_size=9), STATES, DEMANDS, st.text(max_size=9), WEIGHTS)
COSTS = st.builds(StepCost, *[st.floats(0, 1e3)] * 5)
CANDIDATES = st.builds(Candidate, TOKEN, FLOAT, TOKEN)
REQUESTS = st.builds(
    EngineRequest,
    request_id=st.text(max_size=9),
    model=st.text(max_size=9),
    prompt_token_ids=IDS,
    sampling=SAMPLING,
    stopping=st.builds(Stopping, TOKEN, TOKEN, SET, SET),
    scheduling=STATES,
    resume_token_ids=IDS,
    prediction=st.none() | st.builds(LengthPrediction, FLOAT, FLOAT),
    sequence_index=TOKEN,
    tenant=st.text(max_size=9),
    cache_salt=st.text(max_size=9),
    bypass_prefix_cache=st.booleans(),
    kv_swap_format=st.sampled_from([None, "raw", "int8"]),
    slo=st.none() | st.builds(SloTargets, st.none() | FLOAT, st.none() | FLOAT, FLOAT),
)
REASONS = st.dictionaries(st.sampled_from(PreemptionReason), st.integers(1, 9))
EXECUTIONS = st.builds(Execution, REASONS, TOKEN, TOKEN, FLOAT, FLOAT, FLOAT, is_overdue=st.booleans())
REFS = st.builds(LeaseRef, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
LEASES = st.builds(Lease, REFS, st.text(max_size=5), IDS, TOKEN, IDS)
POSITIONS = st.builds(TokenLogprobs, CANDIDATES, st.lists(CANDIDATES, max_size=3).map(tuple))


@given(REQUESTS)
def test_a_request_survives_the_round_trip(request: EngineRequest) -> None:
    assert convert.request_from_wire(convert.request_to_wire(request)) == request


@given(STATES)
def test_a_scheduling_state_survives_the_round_trip(state: SchedulingState) -> None:
    assert convert.scheduling_from_wire(convert.scheduling_to_wire(state)) == state


@given(DEMANDS)
def test_a_kv_demand_survives_the_round_trip(demand: KvDemand) -> None:
    assert convert.demand_from_wire(convert.demand_to_wire(demand)) == demand


@given(QUEUED)
def test_a_queued_request_survives_the_round_trip(request: QueuedRequest) -> None:
    assert convert.queued_from_wire(convert.queued_to_wire(request)) == request


@given(COSTS)
def test_a_step_cost_survives_the_round_trip(cost: StepCost) -> None:
    assert convert.cost_from_wire(convert.cost_to_wire(cost)) == cost


@given(st.lists(POSITIONS, max_size=4))
def test_log_probabilities_survive_the_round_trip(positions: list[TokenLogprobs]) -> None:
    assert convert.logprobs_from_wire(convert.logprobs_to_wire(positions)) == tuple(positions)


@given(LEASES)
def test_a_lease_survives_the_round_trip(lease: Lease) -> None:
    assert convert.lease_from_wire(convert.lease_to_wire(lease)) == lease
    assert convert.ref_from_wire(convert.ref_to_wire(lease.ref)) == lease.ref


@given(EXECUTIONS)
def test_an_execution_survives_the_round_trip(execution: Execution) -> None:
    """Without ``recomputed_s``, which the router measures."""
    assert convert.execution_from_wire(convert.execution_to_wire(execution)) == execution


@given(st.sampled_from(FinishReason), TOKEN)
def test_a_finish_survives_the_round_trip(reason: FinishReason, token_id: int) -> None:
    finish = Finish(reason, None if reason is FinishReason.LENGTH else token_id)
    assert convert.finish_from_wire(convert.finish_to_wire(finish)) == finish


@pytest.mark.parametrize(
    ("value", "message", "renamed"),
    [
        (EngineRequest, request_pb2.EngineRequest, {}),
        (Sampling, request_pb2.Sampling, {"allowed_token_ids": "allowed"}),
        (Stopping, request_pb2.Stopping, {}),
        (SchedulingState, request_pb2.SchedulingState, {"arrived_at_s": "arrived_at_unix_s"}),
        (LengthPrediction, request_pb2.LengthPrediction, {}),
        (SloTargets, request_pb2.SloTargets, {}),
        (Finish, request_pb2.Finish, {}),
        (LeaseRef, request_pb2.LeaseRef, {}),
        (Lease, kvstore_pb2.Lease, {}),
        (KvDemand, kvstore_pb2.KvDemand, {}),
        (QueuedRequest, kvstore_pb2.QueuedRequest, {}),
        (StepCost, kvstore_pb2.StepCost, {}),
    ],
    ids=lambda item: getattr(item, "__name__", ""),
)
def test_a_message_has_the_fields_of_its_value(value: Any, message: type[Message], renamed: dict[str, str]) -> None:
    fields = {renamed.get(field.name, field.name) for field in dataclasses.fields(value)}
    assert {field.name for field in message.DESCRIPTOR.fields} == fields


def test_every_finish_reason_has_a_number_of_its_own() -> None:
    numbers = {convert.finish_to_wire(Finish(reason)).reason for reason in FinishReason}
    assert len(numbers) == len(FinishReason)
    assert request_pb2.FINISH_REASON_UNSPECIFIED not in numbers


def test_no_allowed_tokens_differ_from_no_restriction() -> None:
    def survives(allowed: tuple[int, ...] | None) -> tuple[int, ...] | None:
        sampling = Sampling(allowed_token_ids=allowed)
        request = EngineRequest("r", "m", (1,), sampling, Stopping(1), SchedulingState(0, 0.0))
        return convert.request_from_wire(convert.request_to_wire(request)).sampling.allowed_token_ids

    assert survives(()) == ()
    assert survives(None) is None


def test_zero_log_probabilities_differ_from_none_requested() -> None:
    wire = convert.request_to_wire(
        EngineRequest("r", "m", (1,), Sampling(logprobs=0), Stopping(1), SchedulingState(0, 0.0))
    )
    sampling = convert.request_from_wire(wire).sampling
    assert (sampling.logprobs, sampling.prompt_logprobs) == (0, None)


def test_an_unknown_swap_format_is_the_default_of_the_model() -> None:
    wire = request_pb2.EngineRequest(kv_swap_format="int2")
    assert convert.request_from_wire(wire).kv_swap_format is None


def test_equal_sets_of_tokens_are_encoded_equally() -> None:
    def encoded(tokens: list[int]) -> bytes:
        stopping = Stopping(1, stop_token_ids=frozenset(tokens), eos_token_ids=frozenset(tokens))
        request = EngineRequest("r", "m", (1,), Sampling(), stopping, SchedulingState(0, 0.0))
        return convert.request_to_wire(request).SerializeToString()

    tokens = [8, 1, 1 << 31, 16, 0]
    assert encoded(tokens) == encoded(tokens[::-1])


def test_columns_of_log_probabilities_that_differ_in_length_are_refused() -> None:
    wire = request_pb2.Logprobs(counts=[2], token_ids=[1, 2], logprobs=[-0.5, -1.5], ranks=[1])
    with pytest.raises(ValueError, match="zip"):
        convert.logprobs_from_wire(wire)


STANDINGS = st.builds(
    TenantStanding, st.integers(-1, 2**16), st.integers(-(2**31), 2**31 - 1), st.just(True), st.booleans(),
    st.integers(0, 2**32),
)  # fmt: skip


@given(STATES, st.one_of(STANDINGS, st.just(SOLE_TENANT)))
def test_the_standing_of_a_tenant_survives_the_round_trip(state: SchedulingState, standing: TenantStanding) -> None:
    state = state.with_standing(standing)
    found = convert.scheduling_from_wire(convert.scheduling_to_wire(state))
    assert (found, found.precedence) == (state, state.precedence)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_that_is_none_is_1(weight: float) -> None:
    assert convert.queued_from_wire(kvstore_pb2.QueuedRequest(tenant_weight=weight)).tenant_weight == 1.0
    assert convert.request_from_wire(request_pb2.EngineRequest(tenant_weight=weight)).tenant_weight == 1.0
