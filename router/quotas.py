"""What the pipeline needs of quotas: a reservation for each request, and its settlement."""

from __future__ import annotations

from typing import Protocol

from muxmesh.tenants.tenant import Tenant


class Settles(Protocol):
    """A reservation. `settle` is called once, however the request ends."""

    def settle(self, prompt_tokens: int, output_tokens: int) -> None:
        """Charges what was used and gives back the rest."""


class Quotas(Protocol):
    """Reserves what requests are expected to use; see `router.quota_keeper`."""

    async def reserve(self, tenant: Tenant, num_tokens: int) -> Settles:
        """Reserves one request of ``num_tokens``. Raises QuotaExceeded or Unavailable."""


class _Nothing:
    """A mesh without API keys has no quotas."""

    async def reserve(self, tenant: Tenant, num_tokens: int) -> Settles:
        return self

    def settle(self, prompt_tokens: int, output_tokens: int) -> None:
        pass


NO_QUOTAS: Quotas = _Nothing()
