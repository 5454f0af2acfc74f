"""The conversion of errors to gRPC status and back, without a server. `test_server` sends them."""

from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc.aio import AioRpcError, Metadata

from muxmesh import errors
from muxmesh.rpc.status_codes import DOMAIN, STATUS_CODES, from_rpc_error, status_code, to_status

EXAMPLES: list[errors.MeshError] = [
    errors.InvalidRequest("stopping.max_new_tokens", "is 0; at least 1"),
    errors.Overloaded("full", retry_after_s=2.5),
    errors.QuotaExceeded("tokens_per_minute", "no tokens are left", retry_after_s=7.25),
    *(
        kind("the reason")
        for kind in STATUS_CODES
        if kind not in (errors.InvalidRequest, errors.Overloaded, errors.QuotaExceeded)
    ),
]


def received(error: errors.MeshError) -> errors.MeshError:
    """The error that a client gets."""
    status = to_status(error)
    sent = AioRpcError(status.code, Metadata(), Metadata(*status.trailing_metadata), details=status.details)
    return from_rpc_error(sent)


def foreign(code: grpc.StatusCode, *details: Any, number: int | None = None, text: str | None = "no route") -> Any:
    """An error of another server, with these details in its trailing metadata."""
    packed = [any_pb2.Any() for _ in details]
    for target, detail in zip(packed, details, strict=True):
        target.Pack(detail)
    status = status_pb2.Status(code=code.value[0] if number is None else number, details=packed)
    trailers = [("grpc-status-details-bin", status.SerializeToString())] if details else []
    return AioRpcError(code, Metadata(), Metadata(*trailers), details=text)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_a_client_receives_the_error_that_the_server_raised(error: errors.MeshError) -> None:
    decoded = received(error)
    assert type(decoded) is type(error)
    assert str(decoded) == str(error)
    assert vars(decoded) == pytest.approx(vars(error))


def test_every_error_that_a_service_may_raise_has_a_code() -> None:
    def tree(kind: type[errors.MeshError]) -> set[type[errors.MeshError]]:
        children = (child for child in kind.__subclasses__() if child.__module__ == errors.__name__)
        return {kind}.union(*map(tree, children))

    of_base_class = {errors.MeshError, errors.ModelUnsupported}
    assert tree(errors.MeshError) - of_base_class == set(STATUS_CODES)


@pytest.mark.parametrize(
    ("code", "kinds"),
    [
        (grpc.StatusCode.UNAVAILABLE, {errors.Unavailable, errors.WorkerLost, errors.TlsFailed, errors.DeviceLost}),
        (grpc.StatusCode.CANCELLED, {errors.RequestAborted, errors.RequestPreempted}),
        (
            grpc.StatusCode.INTERNAL,
            {errors.InternalError, errors.EngineFailed, errors.SequenceFailed, errors.DeviceError},
        ),
    ],
)
def test_errors_that_share_a_code_are_distinguished_by_name(
    code: grpc.StatusCode, kinds: set[type[errors.MeshError]]
) -> None:
    assert {kind for kind, used in STATUS_CODES.items() if used is code} == kinds
    assert {type(received(kind("x"))) for kind in kinds} == kinds


def test_an_error_outside_the_table_has_the_code_of_its_base_class() -> None:
    class Special(errors.WorkerLost):
        pass

    assert status_code(Special("x")) is grpc.StatusCode.UNAVAILABLE
    assert status_code(errors.ModelUnsupported("x")) is grpc.StatusCode.INVALID_ARGUMENT
    assert type(received(errors.ConfigError("x"))) is errors.ConfigError


def details_of(error: errors.MeshError) -> dict[str, Any]:
    (value,) = [value for key, value in to_status(error).trailing_metadata if key == "grpc-status-details-bin"]
    found: dict[str, Any] = {}
    for packed in status_pb2.Status.FromString(value).details:
        name = packed.type_url.rpartition(".")[2]
        found[name] = getattr(error_details_pb2, name)()
        assert packed.Unpack(found[name])
    return found


def test_clients_of_any_language_find_the_field_and_the_retry_delay_in_the_details() -> None:
    invalid = details_of(EXAMPLES[0])
    (violation,) = invalid["BadRequest"].field_violations
    assert (violation.field, violation.description) == ("stopping.max_new_tokens", "is 0; at least 1")
    assert (invalid["ErrorInfo"].reason, invalid["ErrorInfo"].domain) == ("InvalidRequest", DOMAIN)
    assert details_of(EXAMPLES[1])["RetryInfo"].retry_delay.ToMilliseconds() == 2500
    assert set(details_of(errors.LeaseLost("x"))) == {"ErrorInfo"}
    exceeded = details_of(EXAMPLES[2])
    (quota,) = exceeded["QuotaFailure"].violations
    assert (quota.subject, quota.description) == ("limit:tokens_per_minute", "no tokens are left")
    assert exceeded["RetryInfo"].retry_delay.ToMilliseconds() == 7250


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.NOT_FOUND, errors.ModelNotFound),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.Overloaded),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, errors.RequestAborted),
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.UNAUTHENTICATED, errors.Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, errors.PermissionDenied),
        (grpc.StatusCode.UNKNOWN, errors.InternalError),
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InternalError),
    ],
)
def test_a_foreign_status_becomes_the_error_that_fits_its_code(
    code: grpc.StatusCode, kind: type[errors.MeshError]
) -> None:
    error = from_rpc_error(foreign(code))
    assert type(error) is kind
    assert str(error) == "no route"


def test_a_status_without_a_message_is_named_by_its_code() -> None:
    assert str(from_rpc_error(foreign(grpc.StatusCode.UNAVAILABLE, text=None))) == "UNAVAILABLE"
    assert str(from_rpc_error(foreign(grpc.StatusCode.UNAVAILABLE, text=""))) == "UNAVAILABLE"


def test_details_of_another_domain_are_ignored() -> None:
    info = error_details_pb2.ErrorInfo(reason="LeaseLost", domain="example.com")
    assert type(from_rpc_error(foreign(grpc.StatusCode.UNAVAILABLE, info))) is errors.Unavailable


def test_an_error_that_this_version_does_not_know_is_an_internal_error() -> None:
    info = error_details_pb2.ErrorInfo(reason="ErrorOfALaterVersion", domain=DOMAIN)
    error = from_rpc_error(foreign(grpc.StatusCode.RESOURCE_EXHAUSTED, info))
    assert type(error) is errors.InternalError
    assert str(error) == "no route"


def test_details_that_contradict_the_status_of_the_call_are_ignored() -> None:
    """A proxy may replace the status but keep the trailing metadata."""
    info = error_details_pb2.ErrorInfo(reason="LeaseLost", domain=DOMAIN)
    failed_precondition = grpc.StatusCode.FAILED_PRECONDITION.value[0]
    error = from_rpc_error(foreign(grpc.StatusCode.DEADLINE_EXCEEDED, info, number=failed_precondition))
    assert type(error) is errors.DeadlineExceeded


def test_further_details_do_not_hide_the_error() -> None:
    help_links = error_details_pb2.Help()
    info = error_details_pb2.ErrorInfo(reason="LeaseLost", domain=DOMAIN)
    assert type(from_rpc_error(foreign(grpc.StatusCode.FAILED_PRECONDITION, help_links, info))) is errors.LeaseLost


OF_THE_MESH = [error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN) for reason in ("InvalidRequest", "Overloaded")]


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED])
@pytest.mark.parametrize(
    "details", [OF_THE_MESH[:1], OF_THE_MESH[1:], [OF_THE_MESH[0], error_details_pb2.BadRequest()]]
)
def test_an_error_without_the_details_of_its_kind_is_the_one_that_fits_the_code(
    code: grpc.StatusCode, details: list[Any]
) -> None:
    kind = errors.Overloaded if code is grpc.StatusCode.RESOURCE_EXHAUSTED else errors.InternalError
    error = from_rpc_error(foreign(code, *details))
    assert type(error) is kind
    assert str(error) == "no route"


@pytest.mark.parametrize("type_name", ["ErrorInfo", "BadRequest", "RetryInfo"])
def test_a_detail_that_cannot_be_parsed_is_ignored(type_name: str) -> None:
    broken = any_pb2.Any(type_url=f"type.googleapis.com/google.rpc.{type_name}", value=b"\xff\xff")
    reason = {"BadRequest": "InvalidRequest", "RetryInfo": "Overloaded"}.get(type_name)
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)
    status = status_pb2.Status(code=grpc.StatusCode.UNAVAILABLE.value[0], details=[broken])
    if reason is not None:
        status.details.add().Pack(info)
    trailers = Metadata(("grpc-status-details-bin", status.SerializeToString()))
    error = from_rpc_error(AioRpcError(grpc.StatusCode.UNAVAILABLE, Metadata(), trailers, details="no route"))
    assert type(error) is errors.Unavailable


@pytest.mark.parametrize("value", [b"", b"\xff", b"\x1a\x05abc", bytes(range(256))])
def test_trailing_metadata_of_any_bytes_does_not_hide_the_status(value: bytes) -> None:
    trailers = Metadata(("grpc-status-details-bin", value))
    error = from_rpc_error(AioRpcError(grpc.StatusCode.UNAVAILABLE, Metadata(), trailers, details="no route"))
    assert type(error) is errors.Unavailable
    assert str(error) == "no route"


@pytest.mark.parametrize("character", ["a", "\n", "😀", "\ud800"])
def test_an_error_of_any_length_fits_into_the_metadata_that_clients_accept(character: str) -> None:
    """grpc-message has each byte that is not ASCII as three; details are base64. Clients accept 8 KiB by default."""
    status = to_status(errors.InvalidRequest(character * 9000, character * 9000))
    message = "".join(chr(byte) if 0x20 <= byte < 0x7F else f"%{byte:02X}" for byte in status.details.encode())
    binary = sum(len(value) for _, value in status.trailing_metadata)
    assert len(message) + binary * 4 / 3 < 8000
    error = received(errors.InvalidRequest(character * 9000, "is unknown"))
    assert isinstance(error, errors.InvalidRequest) and error.problem == "is unknown"
    assert error.field.isprintable()
