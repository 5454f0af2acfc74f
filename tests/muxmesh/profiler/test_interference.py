import math

import pytest

from muxmesh.placement.measured_cells import MAX_CONTENTION, Cell, Slowdown
from muxmesh.profiler.grid import Grid, ModelLimits
from muxmesh.profiler.interference import fit_contention, groups_of
from muxmesh.types import Role

MODELS = [ModelLimits("a", 16, 8192, 1 << 20), ModelLimits("b", 2, 8192, 1 << 20)]


def slowdown(ratio: float, *others: int) -> Slowdown:
    cells = [Cell("m", Role.DECODE, share, 1, 64) for share in (10, *others)]
    return Slowdown(cells[0], tuple(cells[1:]), 2.0, 2.0 * ratio)


def grid(*shares: int) -> Grid:
    return Grid(shares, (1, 2, 4, 8), (64, 256, 1024), 2048)


def test_the_factor_of_slowdowns_that_follow_the_rule_is_found_without_error() -> None:
    fitted = fit_contention([slowdown(1.25, 50), slowdown(1.45, 50, 40), slowdown(1.1, 20)])
    assert fitted is not None
    assert fitted.factor == pytest.approx(0.5)
    assert fitted.error == pytest.approx(0, abs=1e-12)


def test_the_factor_is_that_of_least_squares_and_never_negative() -> None:
    measured = [slowdown(1.3, 50), slowdown(1.1, 50)]
    fitted = fit_contention(measured)
    assert fitted is not None
    assert fitted.factor == pytest.approx(0.4)
    assert fitted.error == pytest.approx(math.sqrt((0.1**2 + 0.1**2) / 2))
    faster = fit_contention([slowdown(0.9, 50)])
    assert faster is not None and faster.factor == 0
    disturbed = fit_contention([slowdown(30.0, 50)])
    assert disturbed is not None and disturbed.factor == MAX_CONTENTION  # which a file may hold
    assert fit_contention([]) is None


def test_groups_are_decodes_beside_each_other_and_beside_prefills_whose_shares_fit_the_device() -> None:
    groups = groups_of(grid(25, 50, 75, 100), MODELS)
    assert [[(cell.role.value, cell.share) for cell in group] for group in groups] == [
        [("decode", 50), ("decode", 50)],
        [("prefill", 50), ("decode", 50)],
        [("decode", 75), ("decode", 25)],
        [("prefill", 75), ("decode", 25)],
        [("decode", 25)] * 3,
        [("prefill", 25), ("decode", 25), ("decode", 25)],
        [("prefill", 25), ("prefill", 25), ("decode", 25)],
    ]
    assert {tuple(cell.model for cell in group) for group in groups} == {("a", "b"), ("a", "b", "a")}
    assert {
        (cell.model, cell.batch, cell.length) for group in groups for cell in group if cell.role == Role.DECODE
    } == {
        ("a", 4, 1024),
        ("b", 2, 1024),
    }
    assert {(cell.batch, cell.length) for group in groups for cell in group if cell.role == Role.PREFILL} == {(1, 64)}


def test_there_is_no_group_where_no_two_shares_fit() -> None:
    assert groups_of(grid(100), MODELS) == []
    assert groups_of(grid(60, 100), MODELS) == []
