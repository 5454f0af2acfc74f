import json
from typing import Any

import pytest

from loadtest.record import Run
from loadtest.report import About, build_report
from loadtest.table import COLUMNS, compare, format_value, label, render, render_sweep, rows_of, title
from tests.support.loadtest_reports import document_sets, make_record, make_report

SETS = document_sets()


def single_reports(case: str) -> list[dict[str, Any]]:
    return [one for document in SETS[case] for one in document.get("reports", [document])]


def line_of(table: str, start: str) -> str:
    return next(line for line in table.splitlines() if line.startswith(start))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (0, "0"), (1234567, "1234567"), (0.0, "0.0000"), (0.12345, "0.1235"), (-0.5, "-0.5000"),
        (1.0, "1.00"), (1234.567, "1234.57"), (0.99996, "1.0000"),
    ],
)  # fmt: skip
def test_figures_have_four_decimals_below_one_and_two_above(value: float | None, text: str) -> None:
    assert format_value(value) == text


@pytest.mark.parametrize(("rate", "text"), [(None, "n"), (2.0, "n at 2/s"), (0.5, "n at 0.5/s"), (1e6, "n at 1e+06/s")])
def test_a_label_has_the_rate_if_there_is_one(rate: float | None, text: str) -> None:
    assert label({"name": "n", "rate": rate}) == text
    assert label({"name": "n"}) == "n"


def test_rows_are_the_columns_that_the_report_has_in_order() -> None:
    report = {"failed": 0, "completed": 3, "median_ttft_ms": 1.5, "p99_ttft_ms": None}
    assert list(rows_of(report)) == [
        ("Successful requests", "3"), ("Failed requests", "0"), ("Median TTFT (ms)", "1.50"),
    ]  # fmt: skip


def test_every_column_is_a_metric_of_a_report_of_a_mesh() -> None:
    records = [make_record(0, 0.0, (1.0, 2.0), router_s=0.001)]
    report = build_report(About("n", "t", ["m"], "w", "d"), Run(records, 2.0))
    assert [key for _, key in COLUMNS if key not in report] == []
    assert len({text for text, _ in COLUMNS}) == len(COLUMNS)


@pytest.mark.parametrize("case", sorted(SETS))
def test_tables_are_for_every_report(case: str) -> None:
    single = single_reports(case)
    for one in single:
        assert f"{one['completed']}" in render(one)
    lines = compare(single).splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    if len(single) > 1 and single[0]["median_ttft_ms"]:
        ratio = single[1]["median_ttft_ms"] / single[0]["median_ttft_ms"]
        assert f"({ratio:.2f}x)" in line_of(compare(single), "Median TTFT")


def test_a_table_names_the_report_the_partial_run_and_the_errors() -> None:
    table = render(make_report("ours"))
    assert table.splitlines()[0].strip("=") == " ours at 2/s: a stub "
    assert "PARTIAL: interrupted <i>by</i> the user" in table
    assert "3 x UNAVAILABLE: <b>gone</b>" in table
    complete = render(make_report("ours", num_failed=0))
    assert "PARTIAL" not in complete
    assert "UNAVAILABLE" not in complete


def test_an_error_without_a_message_has_a_line() -> None:
    report = make_report() | {"errors": {"INTERRUPTED": {"count": 7, "messages": []}}}
    assert "7 x INTERRUPTED: " in render(report)


def test_a_table_has_a_line_for_each_group() -> None:
    table = render(make_report(num_failed=0))
    assert [line.split(":")[0] for line in table.splitlines() if "done" in line] == [
        "model a", "model b", "tenant x", "tenant y", "priority 0", "priority 1", "priority 2",
    ]  # fmt: skip
    assert line_of(table, "model a").startswith("model a: 30 done, 0 failed, TTFT 250.00 / ")


def test_a_group_without_a_success_has_no_figures() -> None:
    assert line_of(render(make_report(num_failed=60)), "model a") == (
        "model a: 0 done, 30 failed, TTFT - / - ms, E2EL - / - ms (median / p99)"
    )


@pytest.mark.parametrize("is_read_from_a_file", [False, True])
def test_the_attainment_is_shown_at_powers_of_two(is_read_from_a_file: bool) -> None:
    report = make_report(num_failed=0)
    report["slo"]["attainment"] = {scale: scale / 16 for scale in range(1, 17)}
    if is_read_from_a_file:
        report = json.loads(json.dumps(report))
    assert line_of(render(report), "Within").endswith("1x 6%, 2x 12%, 4x 25%, 8x 50%, 16x 100%")


def test_a_simulation_has_no_driver() -> None:
    report = make_report()
    assert "The driver itself:" in render(report)
    assert "The driver itself:" not in render(report | {"simulation": {}})


def test_a_comparison_shows_ratios_to_the_first_report() -> None:
    ours, theirs = make_report("ours"), make_report("theirs", factor=2.0)
    table = compare([ours, theirs, ours])
    assert table.splitlines()[0].split() == ["ours", "at", "2/s", "theirs", "at", "2/s", "ours", "at", "2/s"]
    cells = line_of(table, "Mean E2EL (ms)").split()
    ratio = theirs["mean_e2el_ms"] / ours["mean_e2el_ms"]
    assert cells[-4:] == [
        format_value(theirs["mean_e2el_ms"]),
        f"({ratio:.2f}x)",
        format_value(ours["mean_e2el_ms"]),
        "(1.00x)",
    ]


def test_a_comparison_has_no_ratio_to_a_missing_or_zero_figure() -> None:
    success, failure = make_report("a", num_failed=0), make_report("b", num_failed=60)
    assert line_of(compare([failure, success]), "Median TTFT").split()[-2:] == ["-", "250.00"]
    assert line_of(compare([success, failure]), "Median TTFT").split()[-2:] == ["250.00", "-"]
    assert line_of(compare([failure, success]), "Successful").split()[-2:] == ["0", "60"]
    assert line_of(compare([success, failure]), "Successful").split()[-2:] == ["0", "(0.00x)"]


def test_a_comparison_leaves_out_columns_that_no_report_has() -> None:
    table = compare([make_report("a"), make_report("b")])
    assert "router" not in table
    assert "Median ITL" in table


def test_different_workloads_are_named_below_a_comparison() -> None:
    one = make_report()
    other = one | {"workload": "rate=9 lengths=D(1,1)"}
    assert "Not the same workload" not in compare([one, one])
    assert compare([one, other, one]).endswith(
        "\n\nNot the same workload:\n  rate=2 lengths=D(1,1)\n  rate=9 lengths=D(1,1)"
    )


@pytest.mark.parametrize(
    ("name", "text"), [("mesh at a:1", "mesh at a:1 at 2/s"), ("ours", "ours at 2/s: mesh at a:1")]
)
def test_a_report_without_a_name_of_its_own_is_named_once(name: str, text: str) -> None:
    assert title({"name": name, "target": "mesh at a:1", "rate": 2.0}) == text
    assert render({**make_report("ours"), "name": name, "target": "mesh at a:1"}).splitlines()[0].strip("= ") == text


def test_warnings_and_an_unreliable_driver_are_shown() -> None:
    report = {**make_report("ours"), "warnings": ["half was cached"], "driver_bottleneck": "it was late"}
    assert "WARNING: half was cached" in render(report)
    assert "NOT RELIABLE: ours at 2/s: it was late" in compare([make_report("theirs"), report])


@pytest.mark.parametrize("is_read_from_a_file", [False, True])
def test_a_sweep_has_a_line_for_each_rate(is_read_from_a_file: bool) -> None:
    sweep = next(one for case in SETS.values() for one in case if "reports" in one)
    if is_read_from_a_file:
        sweep = json.loads(json.dumps(sweep))
    head, *lines = render_sweep(sweep).splitlines()
    assert head.startswith("rate (req/s)") and "median TTFT (ms)" in head and head.endswith("x unloaded")
    rates = [report["rate"] for report in sweep["reports"]]
    assert [float(line.split()[0]) for line in lines[: len(rates)]] == rates
    assert len({len(line) for line in [head, *lines[: len(rates)]]}) == 1, "columns are aligned"
    assert lines[-1].startswith("Highest rate within the SLO (")
