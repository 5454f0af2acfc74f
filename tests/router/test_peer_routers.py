"""The counts of several routers together. With processes: tests/mesh/test_several_routers.py."""

from typing import Any

from muxmesh.v1 import mesh_pb2
from router.peer_routers import _SUMMED, _TALLIES, with_peers


def status(model: str, number: int, has_slo: bool = True) -> mesh_pb2.RouterModelStatus:
    tally = mesh_pb2.SloTally(**dict.fromkeys(_TALLIES, number))
    slo = mesh_pb2.SloStatus(total=tally, recent=tally, window_s=60) if has_slo else None
    counts: dict[str, Any] = dict.fromkeys(_SUMMED, number)
    return mesh_pb2.RouterModelStatus(model=model, prediction_tau=0.1 * number, slo=slo, **counts)


def test_counts_are_added_and_the_predictor_is_that_of_the_router_itself() -> None:
    (total, other) = with_peers([status("m", 1), status("n", 5, has_slo=False)], [status("m", 2), status("gone", 9)])
    expected = status("m", 3)
    expected.prediction_tau = 0.1
    assert total == expected
    assert other == status("n", 5, has_slo=False)


def test_every_count_of_a_status_is_added() -> None:
    """A field that is new has to be in one of the lists, or here."""
    fields = {field.name for field in mesh_pb2.RouterModelStatus.DESCRIPTOR.fields}
    assert fields - set(_SUMMED) == {"model", "prediction_tau", "predictions_used", "slo"}
    assert {field.name for field in mesh_pb2.SloTally.DESCRIPTOR.fields} == set(_TALLIES)
