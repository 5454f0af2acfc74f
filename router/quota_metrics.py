"""The metrics of a router's quotas, which it has without API keys too: then they are 0. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from muxmesh.metrics.family import Family, counter, gauge
from router.quota_keeper import QuotaKeeper


def quota_families(keeper: QuotaKeeper | None) -> Iterator[Family]:
    """``keeper`` None: a mesh without API keys."""
    yield counter(
        "muxmesh_quota_refusals_total", "Requests refused as the tenant had used what it may.", ("tenant", "limit"),
        {(name, limit): count for (name, limit), count in (keeper.num_refused if keeper else {}).items()},
    )  # fmt: skip
    yield gauge(
        "muxmesh_quota_reservations", "Reservations of running requests.", (), {(): keeper.num_open if keeper else 0}
    )
    yield gauge(
        "muxmesh_quota_unsettled", "Requests that have ended and that Redis has not settled yet.", (),
        {(): keeper.num_unsettled if keeper else 0},
    )  # fmt: skip
    yield gauge(
        "muxmesh_quota_redis_away", "1 while Redis does not respond.", (), {(): int(keeper.is_away) if keeper else 0}
    )
    yield counter(
        "muxmesh_quota_local_grants_total", "Requests that this router granted by itself, without Redis.", (),
        {(): keeper.num_local if keeper else 0},
    )  # fmt: skip
