import pytest

from muxmesh.profiler.sample_summary import summarize


def test_a_summary_is_the_median_with_the_median_deviation() -> None:
    summary = summarize([1.0, 1.1, 0.9, 1.2, 1.0])
    assert summary.seconds == 1.0
    assert summary.spread == pytest.approx(0.1)
    assert (summary.repeats, summary.outliers) == (5, 0)


def test_a_stall_is_an_outlier_and_does_not_move_the_median() -> None:
    summary = summarize([1.0, 1.01, 0.99, 1.02, 5.0])
    assert summary.seconds == 1.01
    assert summary.outliers == 1


def test_samples_that_are_all_but_equal_have_no_outliers() -> None:
    assert summarize([1.0, 1.0, 1.0, 1.001]).outliers == 0
    assert summarize([2.0]) == summarize([2.0, 2.0][:1])
