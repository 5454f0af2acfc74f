"""The requests of a workload: their times, prompts, lengths and names, from distributions, texts and traces."""

import itertools
import json
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.spec import parse_spec
from loadtest.workload import DEFAULT_CAP, PlannedRequest, arrival_times, plan, sketch
from muxmesh.errors import ConfigError

VOCABULARY = range(100, 200)
TRACE = [{"t": time, "n_in": 20 + time, "n_out": 30 + time} for time in range(6)]


def planned(line: str) -> list[PlannedRequest]:
    return plan(parse_spec(line), VOCABULARY)


def write_jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "trace.jsonl", *TRACE)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "p.jsonl", *({"prompt": f"Text {n}", "n_out": n + 1} for n in range(5)))


def test_the_same_seed_gives_the_same_requests_and_another_seed_others() -> None:
    line = "rate=3 lengths=N(50,20)/(30,10) requests=40 models=a,b tenants=x,y priorities=0,1"
    assert planned(line) == planned(line)
    assert planned(f"{line} seed=1") != planned(line)


def test_arrival_times_do_not_depend_on_the_lengths() -> None:
    short, long = (planned(f"rate=3 lengths=D({n},{n}) requests=20") for n in (5, 50))
    assert [request.at_s for request in short] == [request.at_s for request in long]


def test_times_and_lengths_and_seeds_do_not_depend_on_the_models() -> None:
    line = "rate=3 lengths=N(50,20)/(30,10) requests=20"
    without, with_models = planned(line), planned(f"{line} models=a,b tenants=x,y")
    assert [replace(request, model=None, tenant=None) for request in with_models] == without


def test_more_requests_begin_with_those_of_a_shorter_workload() -> None:
    line = "rate=3 lengths=N(50,20)/(30,10) models=a,b"
    assert planned(f"{line} requests=30")[:10] == planned(f"{line} requests=10")


@pytest.mark.parametrize(
    "line",
    [
        "rate=3 lengths=N(50,20)/(30,10) requests=20 models=a,b tenants=x,y priorities=0,1 seed=5",
        "rate=3 prompts=PROMPTS requests=20",
        "trace=TRACE models=a:3,b",
    ],
)
def test_a_sketch_is_the_plan_without_its_tokens(line: str, trace: Path, prompts: Path) -> None:
    spec = parse_spec(line.replace("TRACE", str(trace)).replace("PROMPTS", str(prompts)))
    for request, one in zip(plan(spec, VOCABULARY), sketch(spec), strict=True):
        for name in ("index", "at_s", "max_new_tokens", "is_forced", "seed", "model", "tenant", "priority"):
            assert getattr(request, name) == getattr(one, name), name
        assert request.prompt == one.body.text or len(request.prompt) == one.body.num_input


@pytest.mark.parametrize(("burstiness", "cv"), [("1", 1.0), ("0.25", 2.0), ("4", 0.5), ("inf", 0.0)])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness: str, cv: float) -> None:
    spec = parse_spec(f"rate=5 burstiness={burstiness} lengths=D(1,1) requests=1")
    times = list(itertools.islice(arrival_times(spec), 20_000))
    gaps = [later - sooner for sooner, later in itertools.pairwise(times)]
    assert times[0] == 0
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.05, abs=1e-9)


@given(st.floats(0.01, 1000), st.floats(0.1, 10), st.integers(0, 100))
def test_arrivals_begin_at_zero_and_never_go_back(rate: float, burstiness: float, seed: int) -> None:
    spec = parse_spec(f"rate={rate} burstiness={burstiness} lengths=D(1,1) requests=1 seed={seed}")
    times = list(itertools.islice(arrival_times(spec), 20))
    assert times[0] == 0
    assert times == sorted(times)


def test_an_infinite_rate_sends_all_requests_at_once() -> None:
    assert {request.at_s for request in planned("rate=inf lengths=D(1,1) requests=5")} == {0.0}


def test_a_duration_ends_the_arrivals() -> None:
    requests = planned("rate=10 lengths=D(3,4) duration=20")
    assert 150 < len(requests) < 250
    assert requests[-1].at_s <= 20
    assert all((len(r.prompt), r.max_new_tokens, r.is_forced) == (3, 4, True) for r in requests)
    assert all(token in VOCABULARY for request in requests for token in request.prompt)


def test_the_shortest_duration_has_one_request() -> None:
    assert [r.at_s for r in planned("rate=0.001 lengths=D(3,4) duration=1e-9")] == [0.0]


def test_the_count_and_the_duration_both_bound_the_requests() -> None:
    assert len(planned("rate=10 burstiness=inf lengths=D(3,4) duration=1 requests=5")) == 5
    assert len(planned("rate=10 burstiness=inf lengths=D(3,4) duration=0.35 requests=500")) == 4


def test_the_lengths_are_bounded_by_max_input_and_cap() -> None:
    requests = planned("rate=1 lengths=U(1,100)/(1,100) requests=200 max_input=30 cap=20")
    assert max(len(r.prompt) for r in requests) == 30
    assert max(r.max_new_tokens for r in requests) == 20
    assert min(len(r.prompt) for r in requests) < 30, "shorter ones stay"


def test_natural_outputs_are_bounded_by_the_cap_alone() -> None:
    line = "rate=1 lengths=D(5,7) requests=3 output=natural"
    assert {(r.max_new_tokens, r.is_forced) for r in planned(line)} == {(DEFAULT_CAP, False)}
    assert {(r.max_new_tokens, r.is_forced) for r in planned(f"{line} cap=3")} == {(3, False)}


def test_models_tenants_and_priorities_have_their_shares() -> None:
    requests = planned("rate=1 lengths=D(1,1) requests=8000 models=a:3,b tenants=x,y:4 priorities=0:9,-1")
    for names, shares in (
        (Counter(r.model for r in requests), {"a": 0.75, "b": 0.25}),
        (Counter(r.tenant for r in requests), {"x": 0.2, "y": 0.8}),
        (Counter(r.priority for r in requests), {0: 0.9, -1: 0.1}),
    ):
        assert {name: count / 8000 for name, count in names.items()} == pytest.approx(shares, abs=0.02)


def test_names_are_unset_where_the_workload_has_none() -> None:
    (request,) = planned("rate=1 lengths=D(1,1) requests=1")
    assert (request.model, request.tenant, request.priority) == (None, None, 0)


def test_alpha_weights_models_by_rank() -> None:
    counts = Counter(r.model for r in planned("rate=1 lengths=D(1,1) requests=9000 models=a,b,c alpha=2"))
    weights = [1, 1 / 4, 1 / 9]
    assert [counts[name] / 9000 for name in "abc"] == pytest.approx([w / sum(weights) for w in weights], abs=0.02)


def test_alpha_of_zero_weights_all_models_alike() -> None:
    counts = Counter(r.model for r in planned("rate=1 lengths=D(1,1) requests=6000 models=a,b,c alpha=0"))
    assert [counts[name] / 6000 for name in "abc"] == pytest.approx([1 / 3] * 3, abs=0.02)


def test_texts_have_natural_outputs_unless_their_length_is_forced(prompts: Path) -> None:
    natural = planned(f"rate=1 prompts={prompts} requests=12 cap=128 chat=yes")
    assert {(r.is_forced, r.is_chat, r.max_new_tokens) for r in natural} == {(False, True, 128)}
    assert len({r.prompt for r in natural[:5]}) == 5
    assert [r.prompt for r in natural[:5]] == [r.prompt for r in natural[5:10]]
    forced = planned(f"rate=1 prompts={prompts} requests=5 output=forced")
    assert {(r.prompt, r.max_new_tokens, r.is_forced) for r in forced} == {(f"Text {n}", n + 1, True) for n in range(5)}


def test_the_order_of_the_texts_depends_on_the_seed(prompts: Path, trace: Path) -> None:
    for arrivals in ("rate=1 requests=5", f"trace={trace}"):
        orders = {tuple(r.prompt for r in planned(f"{arrivals} prompts={prompts} seed={seed}")) for seed in range(5)}
        assert len(orders) > 1


def test_the_length_of_a_text_is_known_only_if_the_file_has_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "b", "input_tokens": 7, "output_tokens": 9})
    bodies = {one.body.text: one.body for one in sketch(parse_spec(f"rate=1 prompts={path} requests=2"))}
    assert (bodies["a"].num_input, bodies["a"].num_output) == (0, None)
    assert (bodies["b"].num_input, bodies["b"].num_output) == (7, 9)


def test_a_trace_with_prompts_has_the_times_of_the_one_and_the_texts_of_the_other(trace: Path, prompts: Path) -> None:
    requests = planned(f"trace={trace} prompts={prompts} output=forced")
    assert [r.at_s for r in requests] == [0, 1, 2, 3, 4, 5]
    assert {r.prompt for r in requests} == {f"Text {n}" for n in range(5)}
    assert [r.max_new_tokens for r in requests] == [30, 31, 32, 33, 34, 35], "the trace has the output lengths"


def test_the_scales_of_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:48.68059,396,0\n"
    )
    requests = planned(f"trace={path} time_scale=0.5 input_scale=0.1 max_input=38 output_scale=0.5")
    assert [r.at_s for r in requests] == pytest.approx([0.0, 1.0])
    assert [(len(r.prompt), r.max_new_tokens, r.is_forced) for r in requests] == [(37, 22, True), (38, 1, True)]


def test_a_scaled_length_is_at_least_one_token(trace: Path) -> None:
    requests = planned(f"trace={trace} input_scale=0.001 output_scale=0.001")
    assert {(len(r.prompt), r.max_new_tokens) for r in requests} == {(1, 1)}


def test_a_mooncake_trace_shares_prefixes_where_its_hash_ids_do(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]},
        {"timestamp": 1500, "input_length": 1300, "output_length": 6, "hash_ids": [1, 2, 9]},
    ]
    path = write_jsonl(tmp_path / "mooncake.jsonl", *rows)
    first, second = (r.prompt for r in planned(f"trace={path}"))
    assert (len(first), len(second)) == (1100, 1300)
    assert first[:1024] == second[:1024]
    assert first[1024:1100] != second[1024:1100]


def test_a_scaled_mooncake_trace_keeps_its_shared_prefixes(tmp_path: Path) -> None:
    rows = [{"timestamp": t, "input_length": 1024, "output_length": 5, "hash_ids": [1, t]} for t in (0, 7)]
    path = write_jsonl(tmp_path / "mooncake.jsonl", *rows)
    first, second = (r.prompt for r in planned(f"trace={path} input_scale=0.125"))
    assert (len(first), len(second)) == (128, 128)
    assert first[:64] == second[:64]
    assert first[64:] != second[64:]


def test_prompts_with_equal_lengths_and_no_hash_ids_differ() -> None:
    assert len({r.prompt for r in planned("rate=1 lengths=D(8,1) requests=50")}) == 50


def test_the_models_of_a_trace_are_ranked_by_use(tmp_path: Path) -> None:
    clients = [7, 3, 3, 5, 3, 5]
    rows = [{"t": n, "client": client, "n_in": 2, "n_out": 3} for n, client in enumerate(clients)]
    path = write_jsonl(tmp_path / "trace.jsonl", *rows)
    models = [r.model for r in planned(f"trace={path} models=big,small")]
    assert models == ["big", "big", "big", "small", "big", "small"], "the third most used begins again"
    assert {r.model for r in planned(f"trace={path}")} == {None}


def test_requests_of_a_trace_without_a_model_are_sampled_by_weight(trace: Path) -> None:
    models = {r.model for r in planned(f"trace={trace} models=a,b")}
    assert models == {"a", "b"}


def test_a_trace_is_bounded_by_count_and_time(tmp_path: Path) -> None:
    rows = [{"t": 100 - n, "n_in": 2, "n_out": 3} for n in range(50)]
    path = write_jsonl(tmp_path / "trace.jsonl", *rows)
    assert [r.at_s for r in planned(f"trace={path} requests=3")] == [0, 1, 2]
    assert len(planned(f"trace={path} duration=9.5")) == 10
    assert len(planned(f"trace={path} duration=9.5 time_scale=2")) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no prompts"),
        ('{"text": "a"}', 'line 1: needs "prompt", a non-empty text'),
        ('{"prompt": ""}', 'line 1: needs "prompt"'),
        ('{"prompt": ["a"]}', 'line 1: needs "prompt"'),
        ('{"prompt": "a", "n_out": 0}', "line 1: output_tokens is 0; it must be a whole number of at least 1"),
        ('{"prompt": "a", "output_tokens": 1.5}', r"output_tokens is 1\.5; it must be a whole number"),
        ('{"prompt": "a"}\n{"prompt": "a", "n_in": -1}', "line 2: input_tokens is -1; it must be a whole number"),
        ('{"prompt": "a", "input_tokens": "5"}', "input_tokens is '5'; it must be a whole number"),
    ],
)
def test_prompts_that_are_wrong_are_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        planned(f"rate=1 requests=1 prompts={path}")
    assert str(path) in str(error.value)


def test_forced_outputs_need_lengths(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", {"prompt": "a"})
    with pytest.raises(ConfigError, match="output=forced needs output_tokens"):
        planned(f"rate=1 requests=1 prompts={path} output=forced")


def test_a_trace_that_is_wrong_is_an_error_of_the_workload(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        planned(f"trace={tmp_path / 'none.jsonl'}")


def test_seeds_differ_between_requests() -> None:
    assert len({r.seed for r in planned("rate=1 lengths=D(1,1) requests=100")}) == 100
