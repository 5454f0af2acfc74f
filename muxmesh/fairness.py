"""The settings of fairness between tenants. Pure values; `kvstore.tenant_service` has the rule."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fairness:
    """How far the service of tenants may differ, and what overdue requests get.

    ``band_s``: seconds of the device by which a tenant may be ahead of the least served one and still compete with it
    by policy. ``overdue_share``: part of the slots of a model's decode workers, in (0, 1], that its overdue requests
    may take before all others while several tenants compete.
    """

    band_s: float = 0.5
    overdue_share: float = 0.25
