"""The page for people: whole, self-contained, and without an error in a real browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from loadtest import table
from loadtest.html import page
from loadtest.record import Record, Run
from loadtest.report import About, Goodput, build_report
from loadtest.slo import Unloaded
from loadtest.svg import Line, plot
from loadtest.sweep import build_sweep

NAME = 'A <script>alert("x")</script> & B'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def report(name: str = NAME, rate: float | None = 2.0, num_failed: int = 3, factor: float = 1.0) -> dict[str, Any]:
    records = []
    for index in range(60):
        record = Record(index, index / 2, "ab"[index % 2], "xy"[index % 2], index % 3)
        record.sent_s = record.scheduled_s
        first_s = record.scheduled_s + factor * (0.1 + index % 7 / 20)
        record.pieces = [(first_s + 0.05 * place * factor, 1) for place in range(10)]
        record.ended_s = record.pieces[-1][0] + 0.01
        record.num_input, record.num_output, record.finish = 20, 10, "length"
        record.status, record.error = ("OK", "") if index >= num_failed else ("UNAVAILABLE", "<b>gone</b>")
        records.append(record)
    run = Run(records, 31.0, partial="interrupted <i>by</i> the user" if num_failed else "", loop_lags_s=[0.001])
    about = About(name, "a stub", ["a", "b"], "rate=2 lengths=D(1,1)", "2026-01-01", rate=rate)
    return build_report(about, run, Goodput(ttft_ms=200.0), Unloaded(0.1, 0.001, 0.03))


def reports() -> dict[str, list[dict[str, Any]]]:
    sweep = build_sweep([report("s", rate, 0, rate) for rate in (1.0, 2.0, 4.0)], 4, 0.9)
    return {
        "one": [report()],
        "one without a rate or errors": [report(rate=None, num_failed=0)],
        "nothing succeeded": [report(num_failed=60)],
        "two": [report("ours"), report("theirs", factor=2.0)],
        "a sweep": [sweep],
        "two sweeps": [sweep, {**sweep, "name": "other"}],
    }


@pytest.mark.parametrize("case", sorted(reports()))
def test_a_page_is_whole_and_needs_nothing_from_elsewhere(case: str) -> None:
    documents = json.loads(json.dumps(reports()[case]))
    text = page(documents)
    assert "<script" not in text
    assert not re.search(r'(src|href)=(?!"data:)', text)
    assert "<b>gone</b>" not in text
    plots = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(plots) >= 6
    for svg in plots:
        ElementTree.fromstring(svg)
    assert "NaN" not in text
    assert "nan" not in re.sub(r"[^ ]*nan[^ ]*ce", "", "".join(plots))


@pytest.mark.parametrize("case", sorted(reports()))
def test_tables_are_for_every_report(case: str) -> None:
    documents = json.loads(json.dumps(reports()[case]))
    single = [one for document in documents for one in document.get("reports", [document])]
    for one in single:
        assert f"{one['completed']}" in table.render(one)
    lines = table.compare(single).splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    if len(single) > 1 and single[0]["median_ttft_ms"]:
        ratio = single[1]["median_ttft_ms"] / single[0]["median_ttft_ms"]
        assert f"({ratio:.2f}x)" in next(line for line in lines if line.startswith("Median TTFT"))


def test_a_plot_of_odd_values_stands() -> None:
    odd = [
        Line("flat", [1, 2, 3], [5, 5, 5]),
        Line("point", [2], [0]),
        Line("none", [], []),
        Line("bad", [1], [float("nan")]),
    ]
    for log_x in (False, True):
        ElementTree.fromstring(plot("t <&>", "x", "y", odd, log_x))
    ElementTree.fromstring(plot("t", "x", "y", []))
    ElementTree.fromstring(plot("t", "x", "y", [Line("wide", [1e-6, 1, 1e9], [0, -4, 1e12])], True))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("case", ["one", "two sweeps"])
def test_a_browser_shows_the_plots_and_has_nothing_to_complain_about(tmp_path: Path, case: str) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(json.loads(json.dumps(reports()[case]))))
    # The probe runs after the page: it measures what the browser has laid out.
    probe = (
        "<script>document.title = JSON.stringify([...document.querySelectorAll('svg')].map(svg => "
        "[svg.getBoundingClientRect().width, svg.querySelectorAll('polyline').length, "
        "svg.querySelector('polyline') ? svg.querySelector('polyline').getTotalLength() : 0]))</script>"
    )
    path.write_text(path.read_text().replace("</body>", f"{probe}</body>"))
    assert BROWSER is not None
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
               f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    plots = json.loads(title.group(1))
    assert len(plots) >= 7
    for width, num_lines, length in plots:
        assert width > 200
        assert num_lines >= 1
        assert length > 20
