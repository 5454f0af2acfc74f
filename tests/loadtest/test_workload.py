"""The requests that a workload makes: who, what, when; from distributions, texts and traces."""

import gzip
import itertools
import json
import math
import statistics
from collections import Counter
from pathlib import Path

import pytest

from loadtest.spec import parse_spec
from loadtest.workload import PlannedRequest, arrival_times, plan
from muxmesh.errors import ConfigError

VOCABULARY = range(100, 200)


def planned(line: str) -> list[PlannedRequest]:
    return plan(parse_spec(line), VOCABULARY)


def test_the_same_seed_gives_the_same_requests_and_another_seed_others() -> None:
    line = "rate=3 lengths=N(50,20)/(30,10) requests=40 models=a,b tenants=x,y priorities=0,1"
    assert planned(line) == planned(line)
    assert planned(f"{line} seed=1") != planned(line)


def test_arrival_times_do_not_depend_on_what_is_asked() -> None:
    short, long = (planned(f"rate=3 lengths=D({n},{n}) requests=20") for n in (5, 50))
    assert [request.at_s for request in short] == [request.at_s for request in long]


@pytest.mark.parametrize(("burstiness", "cv"), [("1", 1.0), ("0.25", 2.0), ("4", 0.5), ("inf", 0.0)])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness: str, cv: float) -> None:
    spec = parse_spec(f"rate=5 burstiness={burstiness} lengths=D(1,1) requests=1")
    times = list(itertools.islice(arrival_times(spec), 20_000))
    gaps = [later - sooner for sooner, later in itertools.pairwise(times)]
    assert times[0] == 0
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.05, abs=1e-9)


def test_all_at_once() -> None:
    assert {request.at_s for request in planned("rate=inf lengths=D(1,1) requests=5")} == {0.0}


def test_a_duration_ends_the_arrivals() -> None:
    requests = planned("rate=10 lengths=D(3,4) duration=20")
    assert 150 < len(requests) < 250
    assert requests[-1].at_s <= 20
    assert all((len(r.prompt), r.max_new_tokens, r.is_forced) == (3, 4, True) for r in requests)
    assert all(token in VOCABULARY for request in requests for token in request.prompt)


@pytest.mark.parametrize(
    ("lengths", "mean_input", "mean_output"),
    [("D(20,7)", 20, 7), ("N(480,100)/(300,50)", 480, 300), ("U(10,20)/(5,9)", 15, 7), ("E(480)/(300)", 480, 300)],
)
def test_lengths_have_their_means(lengths: str, mean_input: float, mean_output: float) -> None:
    requests = planned(f"rate=1 lengths={lengths} requests=4000")
    assert statistics.fmean(len(r.prompt) for r in requests) == pytest.approx(mean_input, rel=0.05)
    assert statistics.fmean(r.max_new_tokens for r in requests) == pytest.approx(mean_output, rel=0.05)
    assert min(len(r.prompt) for r in requests) >= 1


@pytest.mark.parametrize("name", ["lengths.csv.gz", "lengths.csv"])
def test_lengths_from_a_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"n_in,n_out\n5,6\n7,8\n"))
    requests = planned(f"rate=1 lengths={path} requests=50")
    assert {(len(r.prompt), r.max_new_tokens) for r in requests} == {(5, 6), (7, 8)}


@pytest.mark.parametrize(
    "lengths",
    [
        "D(1)",
        "N(1,2)",
        "N(1)/(2)",
        "D(1,2)/(3,4)",
        "X(1,2)",
        "N(a,b)/(c,d)",
        "U(20,10)/(5,9)",
        "U(10,20)/(9,5)",
        "D(-1,2)",
        "nofile.csv",
    ],
)
def test_lengths_that_make_no_sense(lengths: str) -> None:
    with pytest.raises(ConfigError, match="lengths="):
        planned(f"rate=1 lengths={lengths} requests=1")


def test_models_tenants_and_priorities_by_their_parts() -> None:
    requests = planned("rate=1 lengths=D(1,1) requests=8000 models=a:3,b tenants=x,y:4 priorities=0:9,-1")
    for names, parts in (
        (Counter(r.model for r in requests), {"a": 0.75, "b": 0.25}),
        (Counter(r.tenant for r in requests), {"x": 0.2, "y": 0.8}),
        (Counter(r.priority for r in requests), {0: 0.9, -1: 0.1}),
    ):
        assert {name: count / 8000 for name, count in names.items()} == pytest.approx(parts, abs=0.02)


def test_popularity_by_rank() -> None:
    counts = Counter(r.model for r in planned("rate=1 lengths=D(1,1) requests=9000 models=a,b,c alpha=2"))
    weights = [1, 1 / 4, 1 / 9]
    assert [counts[name] / 9000 for name in "abc"] == pytest.approx([w / sum(weights) for w in weights], abs=0.02)


def test_texts_end_by_themselves_unless_their_length_is_forced(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"Text {n}", "n_out": n + 1}) for n in range(5)) + "\n\n")
    natural = planned(f"rate=1 prompts={path} requests=12 cap=128 chat=yes")
    assert {(r.is_forced, r.is_chat, r.max_new_tokens) for r in natural} == {(False, True, 128)}
    assert len({r.prompt for r in natural[:5]}) == 5
    assert [r.prompt for r in natural[:5]] == [r.prompt for r in natural[5:10]]
    forced = planned(f"rate=1 prompts={path} requests=5 output=forced")
    assert {(r.prompt, r.max_new_tokens, r.is_forced) for r in forced} == {(f"Text {n}", n + 1, True) for n in range(5)}


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:48.68059,396,0\n"


def test_an_azure_trace(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    requests = planned(f"trace={path} time_scale=0.5 input_scale=0.1 max_input=38 output_scale=0.5")
    assert [r.at_s for r in requests] == pytest.approx([0.0, 1.0])
    assert [(len(r.prompt), r.max_new_tokens, r.is_forced) for r in requests] == [(37, 22, True), (38, 1, True)]


def test_a_mooncake_trace_shares_prefixes_where_its_hash_ids_do(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]},
        {"timestamp": 1500, "input_length": 1300, "output_length": 6, "hash_ids": [1, 2, 9]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = (r.prompt for r in planned(f"trace={path}"))
    assert (len(first), len(second)) == (1100, 1300)
    assert first[:1024] == second[:1024]
    assert first[1024:1100] != second[1024:1100]


def test_a_scaled_mooncake_trace_keeps_its_shared_prefixes(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    rows = [{"timestamp": t, "input_length": 1024, "output_length": 5, "hash_ids": [1, t]} for t in (0, 7)]
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = (r.prompt for r in planned(f"trace={path} input_scale=0.125"))
    assert (len(first), len(second)) == (128, 128)
    assert first[:64] == second[:64]
    assert first[64:] != second[64:]


def test_the_models_of_a_trace_are_ranked_by_use(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    clients = [7, 3, 3, 5, 3, 5]
    path.write_text("\n".join(json.dumps({"t": n, "client": c, "n_in": 2, "n_out": 3}) for n, c in enumerate(clients)))
    assert [r.model for r in planned(f"trace={path} models=big,small")] == [
        "big",
        "big",
        "big",
        "small",
        "big",
        "small",
    ]
    assert {r.model for r in planned(f"trace={path}")} == {None}


def test_a_trace_is_bounded_by_count_and_time(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps({"t": 100 - n, "n_in": 2, "n_out": 3}) for n in range(50)))
    assert [r.at_s for r in planned(f"trace={path} requests=3")] == [0, 1, 2]
    assert len(planned(f"trace={path} duration=9.5")) == 10


BAD_TRACES = {
    "empty.csv": ("", "has no column TIMESTAMP"),
    "headers.csv": ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no requests"),
    "date.csv": (AZURE + "yesterday,1,1\n", "line 4: TIMESTAMP 'yesterday' is no date"),
    "number.csv": (AZURE + "2023-11-16 18:15:50,many,1\n", "line 4: ContextTokens is 'many', no number"),
    "short.csv": (AZURE + "2023-11-16 18:15:50\n", "line 4: ContextTokens is None, no number"),
    "zero.csv": (AZURE + "2023-11-16 18:15:50,0,1\n", "line 4: ContextTokens is 0; at least 1"),
    "empty.jsonl": ("\n\n", "has no requests"),
    "json.jsonl": ('{"t": 0, "n_in": 1, "n_out": 1}\n{"t": \n', "line 2: no JSON"),
    "list.jsonl": ("[1, 2]\n", "line 1: is list, not a JSON object"),
    "no_time.jsonl": ('{"n_in": 1, "n_out": 1}\n', "line 1: has neither t nor timestamp"),
    "no_length.jsonl": ('{"t": 0, "n_out": 1}\n', "line 1: has no n_in"),
    "negative.jsonl": ('{"t": -1, "n_in": 1, "n_out": 1}\n', "line 1: t is -1; at least 0"),
    "nan.jsonl": ('{"t": NaN, "n_in": 1, "n_out": 1}\n', "line 1: t is nan; at least 0"),
    "hashes.jsonl": ('{"t": 0, "n_in": 1, "n_out": 1, "hash_ids": "x"}\n', "line 1: hash_ids is no list"),
    "cut.csv.gz": (None, "cannot be read|no column"),
}


@pytest.mark.parametrize("name", BAD_TRACES)
def test_a_trace_that_is_wrong_is_refused_by_file_and_line(tmp_path: Path, name: str) -> None:
    text, says = BAD_TRACES[name]
    path = tmp_path / name
    path.write_bytes(gzip.compress(AZURE.encode() * 50)[:40] if text is None else text.encode())
    with pytest.raises(ConfigError, match=says) as error:
        planned(f"trace={path}")
    assert str(path) in str(error.value)


def test_a_trace_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        planned(f"trace={tmp_path / 'none.jsonl'}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no prompts"),
        ('{"text": "a"}', 'line 1: needs "prompt"'),
        ('{"prompt": "a", "n_out": 0}', "output_tokens is 0"),
    ],
)
def test_prompts_that_are_wrong(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        planned(f"rate=1 requests=1 prompts={path}")


def test_forced_lengths_need_lengths(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}')
    with pytest.raises(ConfigError, match="output=forced needs output_tokens"):
        planned(f"rate=1 requests=1 prompts={path} output=forced")


def test_seeds_differ_between_requests() -> None:
    assert len({r.seed for r in planned("rate=1 lengths=D(1,1) requests=100")}) == 100


def test_infinite_numbers_are_refused_where_they_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="duration=inf: must be finite"):
        planned("rate=1 lengths=D(1,1) duration=inf")
    assert math.isinf(parse_spec("rate=inf lengths=D(1,1) requests=1").rate or 0)
