"""What is reserved of a tenant's quota for one request. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from muxmesh.tenants.tenant import Tenant


class _Keeper(Protocol):
    def end(self, one: Reservation, prompt_tokens: int, output_tokens: int) -> None: ...


@dataclass(slots=True)
class Reservation:
    """`settle` has to be called once, however the request ends."""

    keeper: _Keeper
    tenant: Tenant
    reservation_id: str
    number: int
    """The end of its id. Numbers of a router rise."""
    num_tokens: int
    started_at_s: float
    is_granted: bool = False
    """False while Redis is asked for it."""
    was_asked_in_vain: bool = False
    """Whether Redis has not answered."""
    is_local: bool = False
    """Whether this router has granted it by itself."""

    def settle(self, prompt_tokens: int, output_tokens: int) -> None:
        """Charges what was used and gives back the rest. Returns at once: Redis is called in the background."""
        self.keeper.end(self, prompt_tokens, output_tokens)
