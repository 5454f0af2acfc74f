"""The HTML page: complete, self-contained, and without an error in a real browser."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from loadtest.html import page
from tests.support.loadtest_reports import NAME, document_sets, make_report, make_sweep

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SETS = document_sets()


def headings(text: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", text)


@pytest.mark.parametrize("case", sorted(SETS))
def test_a_page_is_complete_and_self_contained(case: str) -> None:
    text = page(SETS[case])
    assert "<script" not in text
    assert not re.search(r'(src|href)=(?!"data:)', text)
    assert "<b>gone</b>" not in text
    plots = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(plots) >= 6
    for svg in plots:
        ElementTree.fromstring(svg)
    assert "NaN" not in text
    assert "nan" not in re.sub(r"[^ ]*nan[^ ]*ce", "", "".join(plots))


def test_names_and_messages_are_escaped() -> None:
    text = page([make_report()])
    assert NAME not in text
    assert "A &lt;script&gt;" in text
    assert "&lt;b&gt;gone&lt;/b&gt;" in text
    assert "Partial: interrupted &lt;i&gt;by&lt;/i&gt; the user" in text


def test_the_title_names_each_system_once() -> None:
    assert "<h1>Load test: ours and theirs</h1>" in page([make_report(name) for name in ("ours", "theirs", "ours")])


def test_each_report_has_a_head_with_its_workload() -> None:
    text = page([make_report("ours"), make_report("theirs")])
    for name in ("ours", "theirs"):
        assert f"<p><b>{name}</b>: a stub, 2026-01-01<br>workload <code>rate=2 lengths=D(1,1)</code></p>" in text


def test_a_complete_run_has_no_warning() -> None:
    assert "class=warn" not in page([make_report(num_failed=0)])


def test_a_driver_that_was_the_bottleneck_is_a_warning() -> None:
    for document in (make_report(), make_sweep(), make_sweep((2.0,))):
        text = page([document | {"driver_bottleneck": "the driver was 50 ms late <p99>"}])
        assert "<p class=warn>Not reliable: the driver was 50 ms late &lt;p99&gt;</p>" in text


def test_errors_are_shown_for_each_run() -> None:
    assert "<th>ours at 2/s<th>requests<th>messages<tr><td>UNAVAILABLE<td>3<td>" in page([make_report("ours")])
    text = page([make_sweep((1.0, 2.0), num_failed=2)])
    for rate in (1, 2):
        assert f"<th>s at {rate}/s<th>requests<th>messages<tr><td>UNAVAILABLE<td>2<td>" in text
    assert "<th>messages" not in page([make_report(num_failed=0)])


@pytest.mark.parametrize(
    ("rates", "highest"), [((1.0, 2.0, 4.0), "1 requests/s"), ((1.0,), "1 requests/s"), ((4.0,), "none of these rates")]
)
def test_a_sweep_shows_its_highest_rate(rates: tuple[float, ...], highest: str) -> None:
    assert (
        "<p>Highest rate at which 90% of the requests stay within 4 times their unloaded latency: "
        f"<b>{highest}</b>.</p>"
    ) in page([make_sweep(rates)])


def test_the_table_of_figures_has_a_column_for_each_run() -> None:
    text = page([make_sweep()])
    table = text[text.index("<h2>Figures</h2>") :].split("</table>")[0]
    assert re.findall(r"<th>([^<]*)", table) == ["", "s at 1/s", "s at 2/s", "s at 4/s"]
    assert "<tr><td>Successful requests<td>60<td>60<td>60" in table
    assert "router" not in table, "a row without a figure is left out"


def test_only_sweeps_are_plotted_against_the_rate() -> None:
    assert "Latency against load" not in headings(page([make_report()]))
    assert "Latency against load" in headings(page([make_sweep()]))


def test_the_attainment_of_each_model_is_plotted() -> None:
    text = page([make_report("ours")])
    assert "SLO attainment by model" in text
    assert "ours at 2/s: each model against multiples of its own latency on an idle server." in text
    assert "<tr><td>SLO attainment (share)<td>" in text


def test_the_slo_is_plotted_for_the_runs_that_have_it() -> None:
    with_slo, without = make_report("with"), make_report("without")
    del without["slo"]
    heading = "Within a multiple of the unloaded latency"
    assert heading not in headings(page([without]))
    text = page([with_slo, without])
    assert heading in headings(text)
    svg = re.findall(r"<svg[^>]*SLO attainment.*?</svg>", text)[0]
    assert "with at 2/s" in svg
    assert "without" not in svg


def test_each_group_has_a_table() -> None:
    text = page([make_report("ours")])
    assert headings(text)[-3:] == ["ours at 2/s, by model", "ours at 2/s, by tenant", "ours at 2/s, by priority"]
    table = text[text.index("ours at 2/s, by priority") :].split("</table>")[0]
    assert re.findall(r"<th>([^<]*)", table) == ["", "0", "1", "2"]


def test_a_run_without_a_success_has_no_curve_of_latencies() -> None:
    text = page([make_report("ours", num_failed=60)])
    (svg,) = re.findall(r"<svg[^>]*Time to first token.*?</svg>", text)
    assert "no data" in svg


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("case", ["one", "two sweeps"])
def test_a_browser_shows_the_plots_without_an_error(tmp_path: Path, case: str) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(SETS[case]))
    # The probe runs after the page and measures the layout.
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


def test_a_simulation_is_not_called_a_load_test() -> None:
    simulated = {**make_report("fcfs"), "simulation": {"policy": "fcfs"}}
    assert "<h1>Simulation: fcfs</h1>" in page([simulated])
    assert "No server was measured" in page([simulated])
    assert "Requests were sent" not in page([simulated])
    both = page([simulated, make_report("ours")])
    assert "<h1>Load test and simulation: fcfs and ours</h1>" in both
    assert "No server was measured" in both and "Requests were sent" in both


def test_a_report_without_a_name_of_its_own_is_named_once() -> None:
    report = {**make_report("mesh at a:1"), "target": "mesh at a:1"}
    assert "<b>mesh at a:1</b>: 2026-01-01" in page([report])


def test_warnings_are_shown_once() -> None:
    text = page([{**make_sweep(), "reports": [{**make_report("a"), "warnings": ["half & half"]}] * 2}])
    assert text.count("<p class=warn>Warning: half &amp; half</p>") == 1


def in_browser(tmp_path: Path, text: str, probe: str, *flags: str) -> Any:
    """The JSON value of ``probe``, a JavaScript expression, on a page."""
    assert BROWSER is not None
    path = tmp_path / "report.html"
    path.write_text(text.replace("</body>", f"<script>document.title = JSON.stringify({probe})</script></body>"))
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", *flags, "--window-size=1000,800",
               f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found is not None
    return json.loads(html.unescape(found.group(1)))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_no_label_is_cut_off_or_covers_a_curve(tmp_path: Path) -> None:
    large = json.loads(json.dumps([make_report("a name that is far too long for a legend " * 9), make_report("b")]))
    for report in large:
        report["series"]["waiting"] = [1.2345e9 * second for second in range(40)]
        report["requests"]["e2el_ms"] = [
            None if value is None else value * 12345 for value in report["requests"]["e2el_ms"]
        ]
    probe = (
        "[...document.querySelectorAll('svg text')].filter(text => { const box = text.getBoundingClientRect(), "
        "frame = text.closest('figure').getBoundingClientRect(); return box.left < frame.left || box.right > "
        "frame.right || box.top < frame.top || box.bottom > frame.bottom }).map(text => text.textContent)"
    )
    assert in_browser(tmp_path, page(large), probe) == []
    assert in_browser(tmp_path, page(large), "document.documentElement.scrollWidth <= innerWidth") is True


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize(("flags", "is_dark"), [([], False), (["--blink-settings=preferredColorScheme=0"], True)])
def test_the_page_follows_the_colour_scheme_of_its_reader(tmp_path: Path, flags: list[str], is_dark: bool) -> None:
    probe = (
        "[document.body, document.querySelector('svg text'), document.querySelector('polyline')].map((node, index) => "
        "getComputedStyle(node)[['backgroundColor', 'fill', 'stroke'][index]].match(/\\d+/g).reduce((a, b) => +a + +b))"
    )
    background, text, curve = in_browser(tmp_path, page([make_report("ours")]), probe, *flags)
    assert (background < text) == is_dark
    assert abs(background - curve) > 200, "the curve is visible"
