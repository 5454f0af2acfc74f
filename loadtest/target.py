"""The interface between the driver and a server: a mesh (`mesh_target`) or an OpenAI-compatible one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from loadtest.workload import PlannedRequest
from muxmesh.slo import Slo


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens arrived. A server that reports no counts before the end has ``num_tokens`` 1 per message."""

    num_tokens: int


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """The output is complete. Token counts are the server's own; ``num_cached`` is None if it reports none.

    ``router_s``: the part of TTFT that a mesh's router took.
    """

    num_input: int
    num_output: int
    finish: str
    num_cached: int | None = None
    router_s: float | None = None


class TargetError(Exception):
    """A request failed.

    ``status``: the server's own status. ``is_unreachable``: no connection, or the connection was lost.
    """

    def __init__(self, status: str, message: str, *, is_unreachable: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.is_unreachable = is_unreachable


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that a server lists.

    ``vocabulary``: the token ids for random prompts. ``takes_cache_salt``: requests with different salts share no
    cached prefix. ``slo``: what the server itself judges its requests by, if it reports that.
    """

    name: str
    vocabulary: range
    takes_cache_salt: bool = True
    slo: Slo | None = None


class Target(Protocol):
    """A server under load."""

    @property
    def name(self) -> str:
        """Kind and address, for reports."""

    async def models(self) -> list[ServedModel]:
        """Lists the served models. Raises Unavailable, with a message for users, if the server does not respond."""

    def stream(self, request: PlannedRequest) -> AsyncIterator[Piece | StreamEnd]:
        """Sends the request. Yields pieces as they arrive, then one StreamEnd. Raises TargetError."""

    async def close(self) -> None:
        """Closes all connections."""
