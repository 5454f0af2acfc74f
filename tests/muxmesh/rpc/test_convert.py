from hypothesis import given
from hypothesis import strategies as st

from muxmesh.rpc import convert
from muxmesh.step_cost import StepCost
from muxmesh.types import (
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
    Stopping,
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
STATES = st.builds(SchedulingState, st.integers(-(2**31), 2**31 - 1), *[st.floats(0, 1e10)] * 5)
DEMANDS = st.builds(KvDemand, TOKEN, TOKEN, st.lists(st.binary(min_size=16, max_size=16), max_size=4).map(tuple), TOKEN)
QUEUED = st.builds(QueuedRequest, TOKEN, st.text(max_size=9), STATES, DEMANDS, st.text(max_size=9))
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
)
LEASES = st.builds(Lease, st.builds(LeaseRef, TOKEN, TOKEN), st.text(max_size=5), IDS, TOKEN, IDS)


@given(REQUESTS)
def test_a_request_comes_back_as_it_was(request: EngineRequest) -> None:
    assert convert.request_from_wire(convert.request_to_wire(request)) == request


@given(st.lists(st.builds(TokenLogprobs, CANDIDATES, st.lists(CANDIDATES, max_size=3).map(tuple)), max_size=4))
def test_log_probabilities_come_back_as_they_were(positions: list[TokenLogprobs]) -> None:
    assert convert.logprobs_from_wire(convert.logprobs_to_wire(positions)) == tuple(positions)


@given(LEASES)
def test_a_lease_comes_back_as_it_was(lease: Lease) -> None:
    assert convert.lease_from_wire(convert.lease_to_wire(lease)) == lease


@given(st.sampled_from(FinishReason), TOKEN)
def test_a_finish_comes_back_as_it_was(reason: FinishReason, token_id: int) -> None:
    finish = Finish(reason, None if reason is FinishReason.LENGTH else token_id)
    assert convert.finish_from_wire(convert.finish_to_wire(finish)) == finish


@given(QUEUED)
def test_a_queued_request_comes_back_as_it_was(request: QueuedRequest) -> None:
    assert convert.queued_from_wire(convert.queued_to_wire(request)) == request


@given(COSTS)
def test_a_step_cost_comes_back_as_it_was(cost: StepCost) -> None:
    assert convert.cost_from_wire(convert.cost_to_wire(cost)) == cost
