"""What a worker is told of tenants reaches its sequences, whichever comes first."""

from muxmesh.engine.sequence import SequenceRecord
from muxmesh.types import SOLE_TENANT, EngineRequest, Sampling, SchedulingState, Stopping, TenantStanding
from worker.lease_client import LeaseStandings
from worker.tenant_standings import _MAX_EARLY, TenantStandings

AHEAD = TenantStanding(3, 0, True, False, 1)


def sequence() -> SequenceRecord:
    request = EngineRequest("r", "m", (1, 2, 3), Sampling(), Stopping(10), SchedulingState(0, 0.0))
    return SequenceRecord(request, 8, b"", (0,))


def test_a_sequence_is_ordered_by_the_standing_that_the_unit_tells() -> None:
    standings, one, other = TenantStandings(), sequence(), sequence()
    standings.begin(1, one)
    standings.begin(2, other)
    standings.change(LeaseStandings((1, 3), AHEAD))
    assert (one.scheduling.standing, other.scheduling.standing) == (AHEAD, SOLE_TENANT)
    standings.end(1)
    standings.change(LeaseStandings((1,), SOLE_TENANT))
    assert one.scheduling.standing == AHEAD, "the worker has it no longer"


def test_a_standing_that_comes_before_the_request_is_kept_for_it() -> None:
    standings, one = TenantStandings(), sequence()
    standings.change(LeaseStandings((1,), SOLE_TENANT))
    standings.change(LeaseStandings((1,), AHEAD))
    standings.begin(1, one)
    assert one.scheduling.standing == AHEAD


def test_only_so_many_standings_of_unknown_leases_are_kept() -> None:
    standings, first, last = TenantStandings(), sequence(), sequence()
    standings.change(LeaseStandings(tuple(range(_MAX_EARLY + 1)), AHEAD))
    standings.begin(0, first)
    standings.begin(_MAX_EARLY, last)
    assert (first.scheduling.standing, last.scheduling.standing) == (SOLE_TENANT, AHEAD)
