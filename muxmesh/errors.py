"""Errors, named by meaning. `muxmesh.rpc.status_codes` maps them to gRPC status codes and back.

MeshError
├── InvalidRequest        the request can never succeed as it is; names the field
├── ModelNotFound         no such model in this mesh
├── Overloaded            try again later
├── DeadlineExceeded      the caller's deadline passed
├── RequestAborted        the request was cancelled
│   └── RequestPreempted  its KV memory was reclaimed; it resumes when memory is free
├── Unavailable           a service cannot be reached
│   └── WorkerLost        a worker died, or lost what it knew of the request
├── LeaseLost             the lease is not (or no longer) the caller's
├── EngineFailed          a step of the engine raised
├── Unauthenticated       no or bad credentials
├── InternalError         a bug in the mesh
└── ConfigError           mesh.yaml or a command line argument is wrong
    └── ModelUnsupported  a model folder that no engine can load; names what it found
"""

from __future__ import annotations


class MeshError(Exception):
    """Base of every error that the mesh raises on purpose."""


class InvalidRequest(MeshError):
    """The request can never succeed as it is. ``field`` is its path in the proto message."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class ModelNotFound(MeshError):
    """No model of this name is served."""


class Overloaded(MeshError):
    """No capacity now. ``retry_after_s`` is when to try again."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(MeshError):
    """The caller's deadline passed."""


class RequestAborted(MeshError):
    """The request was cancelled."""


class RequestPreempted(RequestAborted):
    """The request's KV memory was reclaimed and could not be swapped. It resumes when memory is free."""


class Unavailable(MeshError):
    """A service cannot be reached. Safe to retry as long as no token was received."""


class WorkerLost(Unavailable):
    """A worker died, or was restarted and no longer knows the request."""


class LeaseLost(MeshError):
    """The lease does not exist, has another owner, is at another epoch, or is in a state that forbids the call."""


class EngineFailed(MeshError):
    """A step of the engine raised; the engine itself lives on."""


class Unauthenticated(MeshError):
    """No credentials, or bad ones."""


class InternalError(MeshError):
    """A bug in the mesh."""


class ConfigError(MeshError):
    """A configuration or an argument is wrong; the message names the place and what would be right."""


class ModelUnsupported(ConfigError):
    """A model folder that no engine can load; the message names what is not supported."""
