import json
from pathlib import Path

import pytest

from benchmarks.shared_device.loads import from_trace, planned, popularity, rates_of, streams

CONTENTS = {"a": "lengths=D(20,5)", "b": "lengths=D(30,7)"}


def test_the_rate_of_rank_k_is_proportional_to_k_to_the_minus_alpha() -> None:
    shares = popularity(["a", "b", "c"], 2.0)
    assert shares["a"] / shares["b"] == pytest.approx(4)
    assert shares["a"] / shares["c"] == pytest.approx(9)
    assert [one.rate for one in streams(CONTENTS, 0.0, 6.0)] == [3.0, 3.0]


def test_a_plan_is_the_same_each_time_and_its_requests_share_no_prefix() -> None:
    of = streams(CONTENTS, 1.0, 3.0)
    requests = planned(of, 30.0, seed=4)
    assert requests == planned(of, 30.0, seed=4)
    assert [one.index for one in requests] == list(range(len(requests)))
    assert [one.at_s for one in requests] == sorted(one.at_s for one in requests)
    assert len({one.sent_salt for one in requests}) == len(requests)
    assert {one.max_new_tokens for one in requests if one.model == "b"} == {7}
    rates = rates_of(requests, 30.0)
    assert rates["a"] > rates["b"] > 0


def test_the_arrivals_of_a_model_do_not_depend_on_the_content_of_another() -> None:
    one = planned(streams(CONTENTS, 1.0, 3.0), 30.0, seed=4)
    other = planned(streams(CONTENTS | {"b": "lengths=D(9,9)"}, 1.0, 3.0), 30.0, seed=4)
    assert [r.at_s for r in one if r.model == "a"] == [r.at_s for r in other if r.model == "a"]


def test_the_most_used_model_of_a_trace_is_the_first_one(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [{"t": t, "model": "x" if t % 3 else "y", "n_in": 5, "n_out": 3} for t in range(30)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    requests = from_trace(str(trace), ["a", "b"], "time_scale=0.5 output_scale=2", 10.0)
    assert sum(one.model == "a" for one in requests) > sum(one.model == "b" for one in requests)
    assert max(one.at_s for one in requests) <= 10.0
    assert {one.max_new_tokens for one in requests} == {6}
