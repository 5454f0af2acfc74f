"""Every error of the tree survives the wire; a foreign status becomes the nearest error."""

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from muxmesh import errors
from muxmesh.rpc.status_codes import STATUS_CODES, from_rpc_error, to_status

EXAMPLES: list[errors.MeshError] = [
    errors.InvalidRequest("stopping.max_new_tokens", "is 0; at least 1"),
    errors.Overloaded("full", retry_after_s=2.5),
    *(kind("what happened") for kind in STATUS_CODES if kind not in (errors.InvalidRequest, errors.Overloaded)),
]


def over_the_wire(error: errors.MeshError) -> errors.MeshError:
    status = to_status(error)
    sent = AioRpcError(status.code, Metadata(), Metadata(*status.trailing_metadata), details=status.details)
    return from_rpc_error(sent)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_survives_the_wire(error: errors.MeshError) -> None:
    received = over_the_wire(error)
    assert type(received) is type(error)
    assert str(received) == str(error)
    assert vars(received) == pytest.approx(vars(error))


def test_every_error_that_a_service_may_raise_has_a_code() -> None:
    def leaves(kind: type[errors.MeshError]) -> set[type[errors.MeshError]]:
        return {kind}.union(*(leaves(child) for child in kind.__subclasses__()))

    never_sent = {errors.MeshError, errors.ConfigError, errors.ModelUnsupported}
    assert leaves(errors.MeshError) - never_sent == set(STATUS_CODES)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.CANCELLED, errors.RequestAborted),
        (grpc.StatusCode.UNKNOWN, errors.InternalError),
    ],
)
def test_a_foreign_status_becomes_the_nearest_error(code: grpc.StatusCode, kind: type[errors.MeshError]) -> None:
    error = from_rpc_error(AioRpcError(code, Metadata(), Metadata(), details="no route"))
    assert type(error) is kind
    assert str(error) == "no route"
