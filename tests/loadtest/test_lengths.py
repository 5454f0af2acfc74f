import gzip
import random
import re
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.lengths import parse_lengths
from loadtest.spec import parse_spec
from loadtest.workload import plan
from muxmesh.errors import ConfigError


def samples(text: str, count: int = 200, seed: int = 0) -> list[tuple[int, int]]:
    sample, rng = parse_lengths(text), random.Random(seed)
    return [sample(rng) for _ in range(count)]


@pytest.mark.parametrize(
    ("lengths", "mean_input", "mean_output"),
    [("D(20,7)", 20, 7), ("N(480,100)/(300,50)", 480, 300), ("U(10,20)/(5,9)", 15, 7), ("E(480)/(300)", 480, 300)],
)
def test_lengths_of_a_workload_have_their_means(lengths: str, mean_input: float, mean_output: float) -> None:
    requests = plan(parse_spec(f"rate=1 lengths={lengths} requests=4000"), range(100, 200))
    assert statistics.fmean(len(r.prompt) for r in requests) == pytest.approx(mean_input, rel=0.05)
    assert statistics.fmean(r.max_new_tokens for r in requests) == pytest.approx(mean_output, rel=0.05)
    assert min(len(r.prompt) for r in requests) >= 1


@pytest.mark.parametrize(
    ("lengths", "deviations"), [("N(480,100)/(300,50)", (100, 50)), ("E(480)/(300)", (480, 300)), ("D(9,9)", (0, 0))]
)
def test_lengths_have_their_standard_deviations(lengths: str, deviations: tuple[float, float]) -> None:
    for values, deviation in zip(zip(*samples(lengths, 5000), strict=True), deviations, strict=True):
        assert statistics.pstdev(values) == pytest.approx(deviation, rel=0.06)


def test_uniform_lengths_take_every_value_of_their_range() -> None:
    pairs = samples("U(10,20)/(5,9)", 2000)
    assert {prompt for prompt, _ in pairs} == set(range(10, 21))
    assert {output for _, output in pairs} == set(range(5, 10))


@given(st.sampled_from(["N(1,50)/(2,80)", "E(0)/(1)", "U(0,2)/(0,0)", "D(0,0.2)", "N(0,0)/(0,0)"]), st.integers(0, 99))
def test_every_length_is_at_least_one(lengths: str, seed: int) -> None:
    assert min(min(pair) for pair in samples(lengths, 20, seed)) >= 1


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_constant_is_returned_as_it_is(prompt: int, output: int) -> None:
    assert samples(f"D({prompt},{output})", 1) == [(prompt, output)]


def test_the_same_seed_gives_the_same_lengths() -> None:
    assert samples("N(480,240)/(300,150)") == samples("N(480,240)/(300,150)")
    assert samples("N(480,240)/(300,150)") != samples("N(480,240)/(300,150)", seed=1)


def test_spaces_are_ignored() -> None:
    assert samples("N( 480, 240 ) / (300,150)") == samples("N(480,240)/(300,150)")


@pytest.mark.parametrize("name", ["lengths.csv.gz", "lengths.csv"])
def test_lengths_of_a_workload_come_from_a_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"n_in,n_out\n5,6\n7,8\n"))
    requests = plan(parse_spec(f"rate=1 lengths={path} requests=50"), range(100, 200))
    assert {(len(r.prompt), r.max_new_tokens) for r in requests} == {(5, 6), (7, 8)}


def test_a_file_may_have_other_columns_and_fractions(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("name,n_out,n_in\na,6.4,5\nb,0,-3\n")
    assert set(samples(str(path))) == {(5, 6), (1, 1)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column n_in, n_out"),
        ("n_in,out\n1,2\n", "has no column n_out"),
        ("n_in,n_out\n", "has no rows"),
        ("n_in,n_out\n1,2\n3,many\n", "line 3: n_in and n_out must be numbers"),
        ("n_in,n_out\n1\n", "line 2: n_in and n_out must be numbers"),
        ("n_in,n_out\ninf,2\n", "line 2: n_in and n_out must be numbers up to 10000000"),
        ("n_in,n_out\n1,nan\n", "line 2: n_in and n_out must be numbers up to 10000000"),
    ],
)
def test_a_file_of_lengths_that_is_wrong_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))}: {message}"):
        parse_lengths(str(path))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ("D(1)", "D takes prompt and output tokens, like D(2000,200)"),
        ("D(1,2)/(3,4)", "D takes prompt and output tokens"),
        ("N(1,2)", "N takes 2 number(s) for prompt and for output"),
        ("N(1)/(2)", "N takes 2 number(s)"),
        ("N(1,2)/(3)", "N takes 2 number(s)"),
        ("E(1,2)/(3,4)", "E takes 1 number(s)"),
        ("U(20,10)/(5,9)", "U takes the smaller number first, like U(10,20)/(5,9)"),
        ("U(10,20)/(9,5)", "U takes the smaller number first"),
        ("N(a,b)/(c,d)", "'a,b' is not a list of numbers"),
        ("N(1,2)/(3,)", "'3,' is not a list of numbers"),
        ("D(-1,2)", "every number must be from 0 to 10000000"),
        ("D(inf,2)", "every number must be from 0 to 10000000"),
        ("D(1e300,2)", "every number must be from 0 to 10000000"),
        ("E(nan)/(2)", "every number must be from 0 to 10000000"),
        ("X(1,2)", "is neither a distribution nor a file"),
        ("nofile.csv", "is neither a distribution nor a file"),
    ],
)
def test_lengths_that_are_wrong_are_refused_with_the_reason(lengths: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"lengths={lengths}: {message}")):
        parse_lengths(lengths)
