"""Arrivals and lengths of a case."""

from benchmarks.muxserve.lengths import lengths_of
from tests.benchmarks.muxserve.miniature import model

LENGTHS = lengths_of([(100, 50)])


def test_the_same_requests_reach_a_model_whatever_unit_serves_it() -> None:
    assert model("a", 5).requests(LENGTHS, 1) == model("a", 5, decode_share=30).requests(LENGTHS, 1)
    assert model("a", 5).requests(LENGTHS, 1) != model("a", 5).requests(LENGTHS, 2)
    assert model("a", 5).requests(LENGTHS, 1) != model("b", 5).requests(LENGTHS, 1)


def test_arrivals_lie_within_the_duration_or_have_exponential_gaps() -> None:
    assert all(0 <= at_s <= 1 for at_s, _, _ in model("a", 50).requests(LENGTHS, 1))
    last_s = model("a", 2000, duration_s=None).requests(LENGTHS, 1)[-1][0]
    assert 1800 < last_s < 2200
