"""What the pipeline needs of quotas: a reservation for each request, and its settlement."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol

from muxmesh.tenants.tenant import Tenant


class Settles(Protocol):
    """A reservation. `settle` is called once, however the request ends."""

    @property
    def answer(self) -> Awaitable[None] | None:
        """Ends once the request is granted, or with why it is not. None: it is granted."""

    def settle(self, prompt_tokens: int, output_tokens: int) -> None:
        """Charges what was used and gives back the rest."""


class Quotas(Protocol):
    """Reserves what requests are expected to use; see `router.quota_keeper`."""

    async def reserve(self, tenant: Tenant, num_tokens: int) -> Settles:
        """Reserves one request of ``num_tokens``. Raises QuotaExceeded or Unavailable.

        If `Settles.answer` is set, Redis may still refuse it: no output may be sent before that ends.
        """


class _Nothing:
    """A mesh without API keys has no quotas."""

    answer = None

    async def reserve(self, tenant: Tenant, num_tokens: int) -> Settles:
        return self

    def settle(self, prompt_tokens: int, output_tokens: int) -> None:
        pass


NO_QUOTAS: Quotas = _Nothing()
