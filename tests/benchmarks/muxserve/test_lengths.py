"""Lengths of prompts and outputs, from made-up files."""

from pathlib import Path
from random import Random
from statistics import fmean

import pytest

from benchmarks.muxserve.lengths import lengths_of, read_lengths
from muxmesh.errors import ConfigError


def test_pairs_outside_the_limits_are_left_out() -> None:
    lengths = lengths_of([(16, 4), (48, 100), (15, 100), (2000, 100), (900, 1200), (100, 3)])
    assert lengths.pairs == ((16, 4), (48, 100))
    assert (lengths.mean_prompt, lengths.mean_output) == (32, 52)


def test_samples_have_the_asked_means() -> None:
    lengths = lengths_of([(16, 10), (48, 30)])
    pairs = lengths.sample(Random(1), 4000, 64, 200)
    assert {one for one, _ in pairs} == {32, 96}
    assert fmean(two for _, two in pairs) == pytest.approx(200, rel=0.03)


def test_an_exponential_spread_keeps_the_mean_though_it_is_cut() -> None:
    pairs = lengths_of([(16, 10)]).sample(Random(1), 20_000, 16, 300, "exponential", 800)
    assert fmean(two for _, two in pairs) == pytest.approx(300, rel=0.03)
    assert max(two for _, two in pairs) == 800


def test_a_file_without_lengths_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("n_in,n_out\n20,30\n")
    assert read_lengths(path).pairs == ((20, 30),)
    path.write_text("n_in,n_out\ntwenty,30\n")
    with pytest.raises(ConfigError, match=r"lengths\.csv: is no file of lengths"):
        read_lengths(path)
