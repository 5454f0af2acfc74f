from typing import Any

import pytest

from loadtest.sweep import build_sweep


def report(rate: float, attained: float, partial: str | None = None) -> dict[str, Any]:
    return {
        "name": "n", "target": "t", "workload": f"rate={rate:g}", "date": "d", "rate": rate, "partial": partial,
        "slo": {"attainment": {4: attained, 5: 0.0}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("attained", "highest"),
    [
        ({1: 1.0, 2: 1.0, 4: 1.0}, 4),
        ({1: 1.0, 2: 0.9, 4: 0.89}, 2),
        ({1: 0.5, 2: 0.4}, None),
        ({1: 0.95, 2: 0.85, 4: 0.99}, 1),
    ],
)
def test_the_highest_rate_is_the_last_before_the_first_that_misses(
    attained: dict[int, float], highest: float | None
) -> None:
    sweep = build_sweep([report(rate, share) for rate, share in attained.items()], 4, 0.9)
    assert sweep["highest_rate_within_slo"] == highest


def test_the_order_of_the_reports_does_not_change_the_highest_rate() -> None:
    reports = [report(4, 0.1), report(1, 1.0), report(2, 0.95)]
    sweep = build_sweep(reports, 4, 0.9)
    assert sweep["highest_rate_within_slo"] == 2
    assert sweep["reports"] == reports


def test_rates_are_compared_as_numbers() -> None:
    assert build_sweep([report(10, 0.1), report(9, 1.0)], 4, 0.9)["highest_rate_within_slo"] == 9


def test_a_partial_run_misses_the_slo_and_makes_the_sweep_partial() -> None:
    sweep = build_sweep([report(1, 1.0), report(2, 1.0, "the server is gone"), report(4, 1.0)], 4, 0.9)
    assert sweep["highest_rate_within_slo"] == 1
    assert sweep["partial"] == "the server is gone"


def test_a_sweep_has_the_facts_of_its_first_report_and_its_slo() -> None:
    sweep = build_sweep([report(1, 1.0), report(2, 1.0)], 4, 0.75)
    assert (sweep["name"], sweep["target"], sweep["date"], sweep["partial"]) == ("n", "t", "d", None)
    assert sweep["workload"] == "rate=1"
    assert sweep["slo_wanted"] == {"scale": 4, "attainment": 0.75}


def test_the_scale_chooses_the_attainment() -> None:
    reports = [report(1, 1.0)]
    assert build_sweep(reports, 4, 0.9)["highest_rate_within_slo"] == 1
    assert build_sweep(reports, 5, 0.9)["highest_rate_within_slo"] is None
