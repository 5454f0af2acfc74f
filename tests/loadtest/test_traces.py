import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadtest.traces import MOONCAKE_BLOCK, Arrival, read_trace
from muxmesh.errors import ConfigError

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:48.68059,396,0\n"


def trace_of(folder: Path, *rows: dict[str, Any]) -> list[Arrival]:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return read_trace(path)


@pytest.mark.parametrize("name", ["azure.csv", "azure.csv.gz"])
def test_an_azure_trace_has_dates_and_lengths(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(AZURE.encode()) if name.endswith("gz") else AZURE.encode())
    first, second = read_trace(tmp_path / name)
    assert first == Arrival(0.0, 374, 44)
    assert second == Arrival(second.at_s, 396, 1)
    assert second.at_s == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("first", "second", "gap_s"),
    [
        ("2023-11-16 18:15:46.6805900", "2023-11-16 18:15:46.6905900", 0.01),
        ("2023-11-16 18:15:46", "2023-11-16 18:16:46", 60.0),
        ("2023-11-16 23:59:59.5", "2023-11-17 00:00:00.25", 0.75),
        ("2024-05-10 00:00:00.009930+00:00", "2024-05-10 00:00:01+00:00", 0.99007),
        ("2024-05-10 00:00:00.00993+00:00", "2024-05-10 00:00:00.1+00:00", 0.09007),
    ],
)
def test_the_timestamps_of_azure_may_have_fractions_and_a_zone(
    tmp_path: Path, first: str, second: str, gap_s: float
) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{first},1,1\n{second},1,1\n")
    assert [one.at_s for one in read_trace(path)] == pytest.approx([0.0, gap_s])


def test_a_csv_may_have_other_columns_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text("GeneratedTokens,x,TIMESTAMP,ContextTokens\n7,?,2023-11-16 18:15:46,5\n")
    assert read_trace(path) == [Arrival(0.0, 5, 7)]


def test_a_mooncake_trace_has_milliseconds_and_hash_ids(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 2353]},
        {"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [46, 47, 2366]},
    ]
    first, second = trace_of(tmp_path, *rows)
    assert first == Arrival(0.0, 6955, 52, None, (46, 47, 2353))
    assert second == Arrival(second.at_s, 6472, 26, None, (46, 47, 2366))
    assert second.at_s == pytest.approx(3.053)
    assert MOONCAKE_BLOCK == 512, "the block size of the published traces"


def test_a_plain_trace_has_seconds_and_models(tmp_path: Path) -> None:
    first: dict[str, Any] = {"t": 1.5, "n_in": 2, "n_out": 3, "model": "a"}
    second: dict[str, Any] = {"t": 2.0, "n_in": 4, "n_out": 5, "client": 7}
    assert trace_of(tmp_path, first, second) == [Arrival(0.0, 2, 3, "a"), Arrival(0.5, 4, 5, "7")]


def test_t_goes_before_timestamp(tmp_path: Path) -> None:
    rows = [{"t": time, "timestamp": 99, "n_in": 1, "n_out": 1} for time in (0, 2)]
    assert [one.at_s for one in trace_of(tmp_path, *rows)] == [0.0, 2.0]


def test_an_output_of_no_token_counts_as_one(tmp_path: Path) -> None:
    assert trace_of(tmp_path, {"t": 0, "n_in": 1, "n_out": 0})[0].num_output == 1


def test_numbers_may_be_written_as_text_and_lengths_are_rounded_down(tmp_path: Path) -> None:
    assert trace_of(tmp_path, {"t": "3", "n_in": "5", "n_out": 2.9}) == [Arrival(0.0, 5, 2)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(times=st.lists(st.floats(0, 1e6), min_size=1, max_size=8))
def test_arrivals_are_in_order_of_time_and_the_first_is_at_zero(tmp_path: Path, times: list[float]) -> None:
    arrivals = trace_of(tmp_path, *({"t": time, "n_in": index + 1, "n_out": 1} for index, time in enumerate(times)))
    assert [one.at_s for one in arrivals] == [time - min(times) for time in sorted(times)]
    assert sorted(one.num_input for one in arrivals) == list(range(1, len(times) + 1))


def test_arrivals_at_the_same_time_keep_their_order(tmp_path: Path) -> None:
    arrivals = trace_of(tmp_path, *({"t": 5, "n_in": count, "n_out": 1} for count in (3, 1, 2)))
    assert [one.num_input for one in arrivals] == [3, 1, 2]


BAD_TRACES = {
    "empty.csv": ("", "has no column TIMESTAMP, ContextTokens, GeneratedTokens; a trace is a CSV"),
    "column.csv": ("TIMESTAMP,GeneratedTokens\n", "has no column ContextTokens; a trace is"),
    "headers.csv": ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no requests; a trace is"),
    "date.csv": (AZURE + "yesterday,1,1\n", "line 4: TIMESTAMP 'yesterday' is not a date and time"),
    "number.csv": (AZURE + "2023-11-16 18:15:50,many,1\n", "line 4: ContextTokens is 'many', not a number"),
    "short.csv": (AZURE + "2023-11-16 18:15:50\n", "line 4: ContextTokens is None, not a number"),
    "zero.csv": (AZURE + "2023-11-16 18:15:50,0,1\n", "line 4: ContextTokens is 0; it must be from 1 to 10000000"),
    "empty.jsonl": ("\n\n", "has no requests"),
    "json.jsonl": ('{"t": 0, "n_in": 1, "n_out": 1}\n{"t": \n', "line 2: not JSON"),
    "list.jsonl": ("[1, 2]\n", "line 1: is list, not a JSON object"),
    "no_time.jsonl": ('{"n_in": 1, "n_out": 1}\n', "line 1: has neither t nor timestamp"),
    "no_length.jsonl": ('{"t": 0, "n_out": 1}\n', "line 1: has no n_in"),
    "negative.jsonl": ('{"t": -1, "n_in": 1, "n_out": 1}\n', "line 1: t is -1; it must be finite and at least 0"),
    "nan.jsonl": ('{"t": NaN, "n_in": 1, "n_out": 1}\n', "line 1: t is nan; it must be finite and at least 0"),
    "infinite.jsonl": ('{"t": 0, "n_in": 1e999, "n_out": 1}\n', "line 1: n_in is inf; it must be finite"),
    "huge.jsonl": (f'{{"t": 0, "n_in": 1{"0" * 400}, "n_out": 1}}\n', "line 1: n_in is 10*..., not a number"),
    "large.jsonl": ('{"t": 0, "n_in": 1e300, "n_out": 1}\n', "line 1: n_in is 1e.300; it must be from 1 to 10000000"),
    "zero.jsonl": ('{"t": 0, "n_in": 0, "n_out": 1}\n', "line 1: n_in is 0; it must be from 1 to 10000000"),
    "hashes.jsonl": ('{"t": 0, "n_in": 1, "n_out": 1, "hash_ids": "x"}\n', "hash_ids is not a list of whole numbers"),
    "hash.jsonl": ('{"t": 0, "n_in": 1, "n_out": 1, "hash_ids": [0.5]}\n', "hash_ids is not a list of whole numbers"),
    "cut.csv.gz": (None, "cannot be read|no column"),
}


@pytest.mark.parametrize("name", BAD_TRACES)
def test_a_trace_that_is_wrong_is_refused_by_file_and_line(tmp_path: Path, name: str) -> None:
    text, message = BAD_TRACES[name]
    path = tmp_path / name
    path.write_bytes(gzip.compress(AZURE.encode() * 50)[:40] if text is None else text.encode())
    with pytest.raises(ConfigError, match=message) as error:
        read_trace(path)
    assert str(path) in str(error.value)


def test_a_missing_trace_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_trace(tmp_path / "none.jsonl")
