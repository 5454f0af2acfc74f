"""Errors, named by meaning. `muxmesh.rpc.status` maps them to gRPC status codes and back.

MeshError
├── InvalidRequest        the request can never succeed as it is; names the field
├── ModelNotFound         no such model in this mesh
├── Overloaded            try again later
├── DeadlineExceeded      the caller's deadline passed
├── RequestAborted        the request was cancelled
│   └── GaveWay           its KV memory went to others; it goes on when there is room
├── Unavailable           a service cannot be reached
│   └── WorkerLost        a worker died, or lost what it knew of the request
├── LeaseLost             the lease is not (or no longer) the caller's
├── EngineFailed          a step of the engine raised
├── Unauthenticated       no or bad credentials
├── InternalError         a bug in the mesh
└── ConfigError           mesh.yaml or a command line argument is wrong
    └── ModelUnsupported  a model folder that no engine can load; says what it found
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
    """No room now. ``retry_after_s`` is when to try again."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(MeshError):
    """The caller's deadline passed."""


class RequestAborted(MeshError):
    """The request was cancelled."""


class GaveWay(RequestAborted):
    """The request's KV memory went to others, and there was none to swap to. It goes on when there is room."""


class Unavailable(MeshError):
    """A service cannot be reached. Safe to retry as long as no token came."""


class WorkerLost(Unavailable):
    """A worker died, or was restarted and no longer knows the request."""


class LeaseLost(MeshError):
    """The lease does not exist, has another owner, or is at another epoch."""


class EngineFailed(MeshError):
    """A step of the engine raised; the engine itself lives on."""


class Unauthenticated(MeshError):
    """No credentials, or bad ones."""


class InternalError(MeshError):
    """A bug in the mesh."""


class ConfigError(MeshError):
    """A configuration or an argument is wrong; the message says where and what would be right."""


class ModelUnsupported(ConfigError):
    """A model folder that no engine can load; the message names what is not supported."""
