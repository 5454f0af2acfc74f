"""The table of the gRPC status code of each error, and the conversion in both directions.

Details are sent as google.rpc.Status in the trailing metadata: ErrorInfo has the name of the error and a ticket,
BadRequest the invalid field, RetryInfo the delay before a retry, and QuotaFailure the exceeded limit of the tenant.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from muxmesh import errors
from muxmesh.quoting import cut_to_bytes

_Response = TypeVar("_Response")

DOMAIN = "muxmesh"
_TICKET = "ticket"
"""In the metadata of ErrorInfo."""
_MAX_MESSAGE_BYTES = 1024
"""The message is sent up to three times, once with each byte as three. Clients take at most 8 KiB of metadata."""
_MAX_FIELD_BYTES = 256

STATUS_CODES: dict[type[errors.MeshError], grpc.StatusCode] = {
    errors.ConfigError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ModelNotFound: grpc.StatusCode.NOT_FOUND,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.QuotaExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.RequestAborted: grpc.StatusCode.CANCELLED,
    errors.RequestPreempted: grpc.StatusCode.CANCELLED,
    errors.WorkerLost: grpc.StatusCode.UNAVAILABLE,
    errors.TlsFailed: grpc.StatusCode.UNAVAILABLE,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.LeaseLost: grpc.StatusCode.FAILED_PRECONDITION,
    errors.EngineFailed: grpc.StatusCode.INTERNAL,
    errors.SequenceFailed: grpc.StatusCode.INTERNAL,
    errors.DeviceLost: grpc.StatusCode.UNAVAILABLE,
    errors.DeviceError: grpc.StatusCode.INTERNAL,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.InternalError: grpc.StatusCode.INTERNAL,
}

_TOO_LARGE = re.compile(r"essage larger than max(?: \((\d+) vs\. (\d+)\))?")
"""What gRPC itself says when a message exceeds the limit of its receiver."""

_BY_NAME: dict[str, Callable[..., errors.MeshError]] = {error.__name__: error for error in STATUS_CODES}
_BY_CODE: dict[grpc.StatusCode, Callable[[str], errors.MeshError]] = {
    grpc.StatusCode.NOT_FOUND: errors.ModelNotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.RequestAborted,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
}


def status_code(error: errors.MeshError) -> grpc.StatusCode:
    """The status code of an error: that of its class, or of the nearest base class in the table, or INTERNAL."""
    return next((STATUS_CODES[kind] for kind in type(error).__mro__ if kind in STATUS_CODES), grpc.StatusCode.INTERNAL)


def to_status(error: errors.MeshError) -> Any:
    """Encodes an error as ``grpc.Status``: code, details and trailing metadata for `ServicerContext.abort`."""
    code, message = status_code(error), cut_to_bytes(str(error), _MAX_MESSAGE_BYTES)
    info = error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=DOMAIN)
    if isinstance(error, errors.Overloaded) and error.ticket:
        info.metadata[_TICKET] = error.ticket
    details: list[Any] = [info]
    if isinstance(error, errors.InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=cut_to_bytes(error.field, _MAX_FIELD_BYTES),
            description=cut_to_bytes(error.problem, _MAX_MESSAGE_BYTES),
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, errors.QuotaExceeded):
        exceeded = error_details_pb2.QuotaFailure.Violation(subject=f"limit:{error.quota}", description=message)
        details.append(error_details_pb2.QuotaFailure(violations=[exceeded]))
    if isinstance(error, errors.Overloaded):
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = [any_pb2.Any() for _ in details]
    for target, detail in zip(packed, details, strict=True):
        target.Pack(detail)
    number, _ = code.value
    return rpc_status.to_status(status_pb2.Status(code=number, message=message, details=packed))


def from_rpc_error(error: grpc.aio.AioRpcError) -> errors.MeshError:
    """Decodes the error that `to_status` encoded.

    A status of another origin, or with details that are malformed or missing, becomes the error that fits its code.
    """
    message = error.details() or error.code().name
    status = _rich_status(error)
    info = _detail(status, error_details_pb2.ErrorInfo())
    if info is not None and info.domain == DOMAIN:
        kind = _BY_NAME.get(info.reason, errors.InternalError)
        if kind is errors.InvalidRequest:
            bad = _detail(status, error_details_pb2.BadRequest())
            if bad is not None and bad.field_violations:
                return errors.InvalidRequest(bad.field_violations[0].field, bad.field_violations[0].description)
        elif kind in (errors.Overloaded, errors.QuotaExceeded):
            retry = _detail(status, error_details_pb2.RetryInfo())
            failure = _detail(status, error_details_pb2.QuotaFailure())
            if retry is not None:
                delay_s = retry.retry_delay.ToNanoseconds() / 1e9
                if kind is errors.QuotaExceeded and failure is not None and failure.violations:
                    return errors.QuotaExceeded(failure.violations[0].subject.removeprefix("limit:"), message, delay_s)
                return errors.Overloaded(message, delay_s, info.metadata.get(_TICKET, ""))
        else:
            return kind(message)
    elif error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and (too_large := _TOO_LARGE.search(message)):
        size, limit = too_large.groups()
        return errors.InvalidRequest("request", f"is {size} bytes; at most {limit}" if size else "is too large")
    return _BY_CODE.get(error.code(), errors.InternalError)(message)


async def response_of(call: Awaitable[_Response]) -> _Response:
    """The response of a unary call. Raises the error of `from_rpc_error`."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


def _rich_status(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    """google.rpc.Status from the trailing metadata.

    None if it is missing, cannot be parsed, or contradicts the status of the call.
    """
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            try:
                status = status_pb2.Status.FromString(value)
            except DecodeError:
                return None
            return status if status.code == error.code().value[0] else None
    return None


def _detail(status: status_pb2.Status | None, message: Any) -> Any:
    """``message``, filled from the detail of its type; None if there is none, or it cannot be parsed."""
    for packed in status.details if status is not None else ():
        if packed.Is(message.DESCRIPTOR):
            try:
                packed.Unpack(message)
            except DecodeError:
                return None
            return message
    return None
