"""The same workload at several rates, and the highest one within an SLO. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FORMAT = 1


def build_sweep(reports: Sequence[Mapping[str, Any]], scale: int, wanted: float) -> dict[str, Any]:
    """A sweep of reports, each at its ``rate``: SLO met if ``wanted`` of the requests stay within ``scale`` times the
    unloaded latency. Only the rates below the first that fails count: what a server does once, it has to do again.
    """
    first = reports[0]
    highest = None
    for report in sorted(reports, key=lambda one: float(one["rate"])):
        if report["partial"] or report["slo"]["attainment"][scale] < wanted:
            break
        highest = report["rate"]
    return {
        "muxmesh_loadtest_sweep": FORMAT,
        "name": first["name"],
        "target": first["target"],
        "workload": first["workload"],
        "date": first["date"],
        "partial": next((report["partial"] for report in reports if report["partial"]), None),
        "slo_wanted": {"scale": scale, "attainment": wanted},
        "highest_rate_within_slo": highest,
        "reports": list(reports),
    }
