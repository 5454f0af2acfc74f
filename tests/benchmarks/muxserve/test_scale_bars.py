"""Bars of the study: what is compared with what."""

from __future__ import annotations

import pytest

from benchmarks.muxserve.outcome import Outcome
from benchmarks.muxserve.replay import SLO_SCALES
from benchmarks.muxserve.scale_bars import add_bars, chatlmsys, ours
from benchmarks.muxserve.scale_plans import FOR_ALL, SCALES
from benchmarks.report import Report


def outcome(throughput: float, attainment: float = 1.0) -> Outcome:
    return Outcome(throughput, dict.fromkeys(SLO_SCALES, attainment))


def compared(spatial: Outcome) -> dict[str, Outcome]:
    """Ours, 2 requests/s and all in time, beside `spatial`."""
    mine = {ours(scale): outcome(2.0) for scale in (FOR_ALL, *SCALES)}
    return mine | {"spatial": spatial, "temporal": outcome(1.0, 0.5)}


def bars(**found: dict[str, Outcome]) -> dict[str, float]:
    report = Report("r")
    add_bars(report, {name.replace("_", " "): one for name, one in found.items()})
    return {bar["name"]: bar["value"] for bar in report.bars}


def test_the_gain_is_over_each_baseline_and_the_lead_over_the_better() -> None:
    values = bars(alpha_1=compared(outcome(1.25, 0.25)), alpha_2=compared(outcome(1.6, 0.8)))
    assert values["throughput over spatial, alpha 1"] == pytest.approx(1.6)
    assert values["throughput over spatial, the least, alpha 2"] == pytest.approx(1.25)
    assert values["requests within SLO 8 over spatial, ours >= 99 %, alpha 1, 8"] == pytest.approx(4.0)
    assert values["SLO 2, plan for it: least lead over the better baseline, alpha 2"] == pytest.approx(0.2)


def test_each_slo_scale_has_the_plan_for_it() -> None:
    outcomes = compared(outcome(1.0, 0.5)) | {ours(FOR_ALL): outcome(2.0, 0.4)}
    values = bars(alpha_1=outcomes)
    assert values["SLO 4, plan for it: least lead over the better baseline, alpha 1"] == pytest.approx(0.5)
    assert values["SLO 4, one plan: least lead over the better baseline, alpha 1"] == pytest.approx(-0.1)


def test_published_gains_are_required_of_the_workload_that_they_were_measured_with() -> None:
    outcomes = compared(outcome(1.5)) | {"temporal, MuxServe's plan": outcome(1.25)}
    report = Report("r")
    add_bars(report, {chatlmsys(condensed): outcomes for condensed in (800, 2000)})
    verdicts = {bar["name"]: bar["ok"] for bar in report.bars}
    assert verdicts["ChatLMSYS 2000: throughput over spatial"] is False
    assert verdicts["ChatLMSYS 800: throughput over spatial"] is True
    assert verdicts["ChatLMSYS 2000: throughput over temporal"] is True
