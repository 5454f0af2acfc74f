"""The errors of the mesh, named by meaning. `muxmesh.rpc.status_codes` maps them to gRPC status codes and back.

MeshError
├── InvalidRequest        the request is invalid and a retry fails too; names the field
├── ModelNotFound         the mesh serves no model of this name
├── Overloaded            no free capacity; a later retry may succeed
│   └── QuotaExceeded     the tenant has used what it may for now; names the quota
├── DeadlineExceeded      the caller's deadline passed
├── RequestAborted        the request was cancelled
│   └── RequestPreempted  its KV memory was reclaimed; the request resumes when memory is free
├── Unavailable           a service cannot be reached
│   ├── WorkerLost        a worker died, or restarted without the request
│   └── TlsFailed         no TLS connection: a certificate is not accepted, or one side does not use TLS
├── LeaseLost             the caller does not hold the lease
├── EngineFailed          a step of the engine raised an exception; a retry may succeed
├── SequenceFailed        the engine cannot compute this sequence, and a retry fails too
├── DeviceError           the device or its driver refused an operation; names it and the driver's error
│   └── DeviceLost        the device accepts no more work of this process, which has to end
├── Unauthenticated       the credentials are missing or invalid
├── PermissionDenied      the tenant may not do this
├── InternalError         a bug in the mesh
└── ConfigError           mesh.yaml or a command line argument is invalid
    └── ModelUnsupported  no engine can load the model; names the unsupported part
"""

from __future__ import annotations

from typing import Self


class MeshError(Exception):
    """Base of all errors that the mesh raises deliberately."""


class InvalidRequest(MeshError):
    """The request is invalid. ``field`` is the path of the invalid field in the proto message.

    In errors of the Python client's own checks it is the name of the argument or the option.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        """Lets errors be copied, and pass between processes: the default would call the class with the message."""
        return type(self), (self.field, self.problem)


class ModelNotFound(MeshError):
    """The mesh serves no model of this name."""


class Overloaded(MeshError):
    """There is no free capacity. The caller should wait ``retry_after_s`` seconds before a retry.

    ``ticket``: a retry after that time that sends it, as the metadata `x-muxmesh-ticket`, goes before newcomers.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0, ticket: str = "") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.ticket = ticket

    def __reduce__(self) -> tuple[type[Self], tuple[str, float, str]] | tuple[type[Self], tuple[str, str, float]]:
        """See `InvalidRequest.__reduce__`."""
        return type(self), (str(self), self.retry_after_s, self.ticket)


class QuotaExceeded(Overloaded):
    """A tenant has used what it may for now. ``quota`` is the limit: a field of `muxmesh.tenants.tenant.TenantLimits`.

    ``retry_after_s``: when the request would be granted, if the tenant sends no other one before.
    """

    def __init__(self, quota: str, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.quota = quota

    def __reduce__(self) -> tuple[type[Self], tuple[str, str, float]]:
        """See `InvalidRequest.__reduce__`."""
        return type(self), (self.quota, str(self), self.retry_after_s)


class DeadlineExceeded(MeshError):
    """The caller's deadline passed."""


class RequestAborted(MeshError):
    """The request was cancelled."""


class RequestPreempted(RequestAborted):
    """The request's KV memory was reclaimed without being swapped out. The request resumes when memory is free."""


class Unavailable(MeshError):
    """A service cannot be reached. A retry is safe if no token was received."""


class WorkerLost(Unavailable):
    """A worker died, or restarted and has no record of the request."""


class TlsFailed(Unavailable):
    """There is no TLS connection to the mesh: a certificate is not accepted, or one side does not use TLS.

    The message names the cause and the remedy. A retry fails too.
    """


class LeaseLost(MeshError):
    """The lease does not exist, has another owner or epoch, or is in a state that forbids the call."""


class EngineFailed(MeshError):
    """A step of the engine raised an exception. The engine continues with other sequences."""


class SequenceFailed(MeshError):
    """The engine cannot compute this sequence: its logits are not finite, for example. A retry fails too."""


class DeviceError(MeshError):
    """The device or its driver refused an operation. The message names the operation and the driver's error."""


class DeviceLost(DeviceError):
    """The device accepts no more work of this process: after a fault every later operation fails. It has to end."""


class Unauthenticated(MeshError):
    """The credentials are missing or invalid."""


class PermissionDenied(MeshError):
    """The tenant may not do this, whatever its quota is."""


class InternalError(MeshError):
    """A bug in the mesh."""


class ConfigError(MeshError):
    """A configuration or a command line argument is invalid. The message names the field and the valid values."""


class ModelUnsupported(ConfigError):
    """No engine can load the model. The message names the unsupported part."""
