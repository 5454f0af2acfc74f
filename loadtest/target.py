"""What the driver needs of a server. Two kinds exist: a mesh (`mesh_target`) and an OpenAI-compatible one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from loadtest.workload import PlannedRequest


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens came; how many is not known of every server until the end."""

    num_tokens: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The answer is whole. Counts as the server says them; ``num_cached`` None if it does not.

    ``router_s``: what a mesh's router took of the time to the first token.
    """

    num_input: int
    num_output: int
    finish: str
    num_cached: int | None = None
    router_s: float | None = None


class TargetError(Exception):
    """A request failed. ``status``: the server's own word for it. ``is_unreachable``: nobody answered, or not to the
    end.
    """

    def __init__(self, status: str, message: str, *, is_unreachable: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.is_unreachable = is_unreachable


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as the server tells of it. ``vocabulary``: token ids for random prompts."""

    name: str
    vocabulary: range


class Target(Protocol):
    """A server under load."""

    @property
    def name(self) -> str:
        """Kind and address, for reports."""

    async def models(self) -> list[ServedModel]:
        """What is served. Raises Unavailable with words for a person if nobody answers."""

    def ask(self, request: PlannedRequest) -> AsyncIterator[Piece | Ended]:
        """Sends the request; pieces as they come, then the end. Raises TargetError."""

    async def close(self) -> None:
        """Lets go of connections."""
