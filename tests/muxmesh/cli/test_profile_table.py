from dataclasses import replace

from muxmesh.cli.profile_table import render
from muxmesh.placement.measured_cells import Cell, Slowdown
from muxmesh.placement.profile import ModelProfile, Profile
from muxmesh.profiler.recorder import table_of
from muxmesh.types import Role
from tests.support.profiles import MACHINE, cells

CELLS = cells("m")
PROFILE = Profile(
    MACHINE, {"m": ModelProfile("m", 64 << 20, 512, {1: table_of(CELLS)}, samples=CELLS)}, muxmesh="1.0", date="today"
)


def test_a_profile_is_shown_in_milliseconds_by_share_batch_and_length() -> None:
    lines = render(PROFILE, "profile.yaml").splitlines()
    assert lines[0] == "profile.yaml: A CPU, 2 cores, 8.0 GiB, MuxMesh 1.0, today"
    assert lines[2] == "m: 64 MiB of weights, 512 bytes of KV per token"
    assert lines[3:8] == [
        "  prefill of all prompts, ms",
        "  share  batch  length 64  length 256",
        "   50 %      1         40         100",
        "   50 %      4        100         160",
        "  100 %      1         20          50",
    ]
    assert "16 cells, median spread 1.0%, 0 of 80 samples are outliers" in lines[-3]
    assert lines[-1] == "contention: not measured"


def test_what_was_not_measured_is_a_dash_or_left_out() -> None:
    some = {
        cell: one for cell, one in CELLS.items() if cell.role == Role.DECODE or (cell.batch, cell.length) == (1, 64)
    }
    model = replace(PROFILE.models["m"], tables={1: table_of(some)}, samples=some)
    lines = render(replace(PROFILE, models={"m": model}), "p").splitlines()
    assert lines[4:7] == [
        "  share  batch  length 64  length 256",
        "   50 %      1         40           -",
        "  100 %      1         20           -",
    ]


def test_slowdowns_are_shown_with_the_factor_that_fits_them() -> None:
    one, other = Cell("m", Role.DECODE, 50, 4, 64), Cell("n", Role.PREFILL, 50, 1, 64)
    profile = replace(PROFILE, contention=0.5, contention_error=0.01, slowdowns=(Slowdown(one, (other,), 1.0, 1.25),))
    assert render(profile, "p").splitlines()[-3:] == [
        "contention 0.50: beside others whose shares sum to o, a step takes 1 + 0.50 o times as long (error of a "
        "slowdown: 0.01)",
        "  slowdown  worker         beside",
        "  1.25      m decode 50 %  n prefill 50 %",
    ]
