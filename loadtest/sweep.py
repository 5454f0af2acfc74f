"""The same workload at several rates, and the highest one within an SLO. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FORMAT = 1


def build_sweep(reports: Sequence[Mapping[str, Any]], scale: int, attainment: float) -> dict[str, Any]:
    """Joins reports of the same workload, each at its ``rate``.

    A rate meets the SLO if at least ``attainment`` of the requests stay within ``scale`` times the unloaded latency.
    The highest rate is the last one before the first that misses, so a later rate that meets the SLO by chance is
    ignored.
    """
    first = reports[0]
    highest = None
    for report in sorted(reports, key=lambda one: float(one["rate"])):
        if report["partial"] or report["slo"]["attainment"][scale] < attainment:
            break
        highest = report["rate"]
    return {
        "muxmesh_loadtest_sweep": FORMAT,
        "name": first["name"],
        "target": first["target"],
        "workload": first["workload"],
        "date": first["date"],
        "partial": next((report["partial"] for report in reports if report["partial"]), None),
        "slo_wanted": {"scale": scale, "attainment": attainment},
        "highest_rate_within_slo": highest,
        "reports": list(reports),
    }
