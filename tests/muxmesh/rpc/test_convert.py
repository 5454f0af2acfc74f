from hypothesis import given
from hypothesis import strategies as st

from muxmesh.rpc import convert
from muxmesh.types import (
    Candidate,
    EngineRequest,
    Finish,
    FinishReason,
    Lease,
    LeaseRef,
    LengthPrediction,
    Sampling,
    Standing,
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
CANDIDATES = st.builds(Candidate, TOKEN, FLOAT, TOKEN)
REQUESTS = st.builds(
    EngineRequest,
    request_id=st.text(max_size=9),
    model=st.text(max_size=9),
    prompt_token_ids=IDS,
    sampling=SAMPLING,
    stopping=st.builds(Stopping, TOKEN, TOKEN, SET, SET),
    standing=st.builds(Standing, st.integers(-(2**31), 2**31 - 1), st.floats(0, 1e10)),
    resume_token_ids=IDS,
    prediction=st.none() | st.builds(LengthPrediction, FLOAT, FLOAT),
)
LEASES = st.builds(
    Lease, st.builds(LeaseRef, TOKEN, TOKEN), st.text(max_size=5), IDS, TOKEN, IDS, st.binary(max_size=9)
)


@given(REQUESTS)
def test_a_request_comes_back_as_it_was(request: EngineRequest) -> None:
    assert convert.request_from_wire(convert.request_to_wire(request)) == request


@given(st.lists(st.builds(TokenLogprobs, CANDIDATES, st.lists(CANDIDATES, max_size=3).map(tuple)), max_size=4))
def test_log_probabilities_come_back_as_they_were(places: list[TokenLogprobs]) -> None:
    assert convert.logprobs_from_wire(convert.logprobs_to_wire(places)) == tuple(places)


@given(LEASES)
def test_a_lease_comes_back_as_it_was(lease: Lease) -> None:
    assert convert.lease_from_wire(convert.lease_to_wire(lease)) == lease


@given(st.sampled_from(FinishReason), TOKEN)
def test_a_finish_comes_back_as_it_was(reason: FinishReason, token_id: int) -> None:
    finish = Finish(reason, None if reason is FinishReason.LENGTH else token_id)
    assert convert.finish_from_wire(convert.finish_to_wire(finish)) == finish
