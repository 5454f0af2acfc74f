"""The bars of the study at the size of the paper: MuxServe's published gains, from the outcomes of systems. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.muxserve.outcome import Outcome
from benchmarks.muxserve.scale_plans import FOR_ALL, SCALES
from benchmarks.report import Report

SLO_SCALE = 8
BASELINES = ("spatial", "temporal")
PUBLISHED_GAIN, PUBLISHED_ATTAINMENT_GAIN = 1.8, 2.9
PUBLISHED_CHATLMSYS = {"spatial": 1.38, "temporal": 1.46, "temporal, MuxServe's plan": 1.46}
PUBLISHED_ORDERS = {"fcfs": 1.91, "roundrobin": 1.29}
ORDERS, ABLATIONS = "65B:30B at 1:8", "ablations"
_CHATLMSYS = "ChatLMSYS"
_MUST_GAIN = 2000
"""The ChatLMSYS for which gains are published."""

Outcomes = Mapping[str, Outcome]
"""By the names of systems."""


def ours(scale: int) -> str:
    """The name of the system with our plan for an SLO scale."""
    return "muxmesh" if scale == FOR_ALL else f"muxmesh, plan for SLO {scale}"


def chatlmsys(condensed: int) -> str:
    """The name of the workload."""
    return f"{_CHATLMSYS} {condensed}"


def attainment(outcomes: Outcomes, scale: int) -> float:
    """Ours at an SLO scale, with the plan for it."""
    return outcomes[ours(scale)].attainment[scale]


def add_bars(report: Report, found: Mapping[str, Outcomes]) -> None:
    """``found``: outcomes by the name of the workload; those that did not run are missing."""
    compared = {name: one for name, one in found.items() if name not in (ORDERS, ABLATIONS)}
    synthetic = {name: one for name, one in compared.items() if not name.startswith(_CHATLMSYS)}
    for condensed in (2000, 800):
        if (name := chatlmsys(condensed)) in compared:
            _add_chatlmsys(report, name, compared[name], is_published=condensed == _MUST_GAIN)
    if synthetic:
        _add_gains(report, synthetic)
    if compared:
        _add_leads(report, compared)
    if ORDERS in found:
        for mode, published in PUBLISHED_ORDERS.items():
            gain = found[ORDERS]["adbs"].throughput / found[ORDERS][mode].throughput
            report.bar(f"adbs over {mode} in one unit", gain, f">= {published}", gain >= published)
    if ABLATIONS in found:
        before, *others = found[ABLATIONS].items()
        for name, one in others:
            report.bar(f"throughput: {name}", one.throughput / before[1].throughput)


def _add_chatlmsys(report: Report, workload: str, outcomes: Outcomes, *, is_published: bool) -> None:
    for baseline, published in PUBLISHED_CHATLMSYS.items():
        gain, must = (
            outcomes[ours(FOR_ALL)].throughput / outcomes[baseline].throughput,
            published if is_published else 1,
        )
        report.bar(f"{workload}: throughput over {baseline}", gain, f"> {must}", gain > must)


def _add_gains(report: Report, synthetic: Mapping[str, Outcomes]) -> None:
    """Throughput over each baseline, and requests within SLO scales at which ours has 99 %."""
    for baseline in BASELINES:
        gains = {name: one[ours(FOR_ALL)].throughput / one[baseline].throughput for name, one in synthetic.items()}
        best, least = max(gains, key=gains.__getitem__), min(gains, key=gains.__getitem__)
        report.bar(
            f"throughput over {baseline}, {best}", gains[best],
            aim=f"> {PUBLISHED_GAIN}", is_reached=gains[best] > PUBLISHED_GAIN,
        )  # fmt: skip
        report.bar(
            f"throughput over {baseline}, the least, {least}", gains[least], aim=">= 1", is_reached=gains[least] >= 1
        )
        for title, scales in ((f"SLO {SLO_SCALE}", (SLO_SCALE,)), ("any SLO", SCALES)):
            ratios = {
                f"{name}, {scale}": attainment(one, scale) / max(1e-9, one[baseline].attainment[scale])
                for name, one in synthetic.items()
                for scale in scales
                if attainment(one, scale) >= 0.99
            }
            if ratios:
                best = max(ratios, key=ratios.__getitem__)
                report.bar(
                    f"requests within {title} over {baseline}, ours >= 99 %, {best}", ratios[best],
                    aim=f"> {PUBLISHED_ATTAINMENT_GAIN}", is_reached=ratios[best] > PUBLISHED_ATTAINMENT_GAIN,
                )  # fmt: skip


def _add_leads(report: Report, compared: Mapping[str, Outcomes]) -> None:
    """The least lead over the better baseline at each SLO scale, with the plan for it and with the one for all."""
    for scale in SCALES:
        for title, is_for_all in (("plan for it", False), ("one plan", True)):
            leads = {
                name: (one[ours(FOR_ALL)].attainment[scale] if is_for_all else attainment(one, scale))
                - max(one[baseline].attainment[scale] for baseline in BASELINES)
                for name, one in compared.items()
            }
            worst = min(leads, key=leads.__getitem__)
            report.bar(
                f"SLO {scale}, {title}: least lead over the better baseline, {worst}", leads[worst],
                aim=">= 0", is_reached=leads[worst] >= 0,
            )  # fmt: skip
