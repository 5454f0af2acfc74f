import pytest

from muxmesh.placement.measured_cells import Cell
from muxmesh.profiler.remaining_time import RemainingTime
from muxmesh.types import Role

PREFILLS = [Cell("m", Role.PREFILL, share, 1, length) for share in (50, 100) for length in (100, 200)]
DECODES = [Cell("m", Role.DECODE, 100, batch, 100) for batch in (1, 2)]


def test_the_rest_is_estimated_from_what_was_measured() -> None:
    remaining = RemainingTime([*PREFILLS, *DECODES], num_groups=2, group_s=5.0)
    assert remaining.seconds is None
    remaining.cell_done(PREFILLS[3], 2.0)  # 200 tokens on the whole device: 1 s for 100 tokens there
    assert remaining.seconds == pytest.approx(1 + 2 + 4 + 2 * 5)
    remaining.cell_done(DECODES[0], 0.5)
    remaining.group_done(9.0)
    assert remaining.seconds == pytest.approx(7 + 0.5 + 9)
    assert (remaining.num_done, remaining.num_left, remaining.num_total) == (3, 5, 8)
