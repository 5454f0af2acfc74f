"""One or several reports as a self-contained HTML page, without scripts or external files. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from loadtest.svg import COLOURS, Line, plot
from loadtest.table import COLUMNS, format_value, label

_POINTS = 200
_DISTRIBUTIONS = {
    "ttft": ("Time to first token", "How long a user waits before anything appears."),
    "tpot": ("Time per output token", "How fast the output is generated after its first token."),
    "e2el": ("End-to-end latency", "How long a user waits for the whole output."),
}
_DARK = ("#60a5fa", "#f87171", "#34d399", "#fbbf24", "#a78bfa", "#22d3ee", "#f472b6", "#9ca3af")


def _series(colours: Sequence[str]) -> str:
    """CSS of the curves, their marks and their names."""
    return "".join(
        f"polyline.s{number}{{stroke:{colour}}}circle.s{number},rect.s{number}{{fill:{colour}}}"
        for number, colour in enumerate(colours)
    )


_STYLE = (
    f"""
:root{{color-scheme:light dark;--text:#1f2937;--soft:#4b5563;--page:#fff;--line:#e5e7eb;--warn:#fef3c7;--code:#f3f4f6}}
{_series(COLOURS)}
@media screen and (prefers-color-scheme:dark){{
:root{{--text:#e5e7eb;--soft:#9ca3af;--page:#111827;--line:#374151;--warn:#4a3a0c;--code:#1f2937}}
{_series(_DARK)}}}
@media print{{
body{{font-size:11px;margin:0;max-width:none}}.plots{{grid-template-columns:1fr 1fr}}
figure,tr,.warn{{break-inside:avoid}}h2{{break-after:avoid}}.warn{{border:1px solid}}}}
"""
    + """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem;color:var(--text);
background:var(--page);overflow-wrap:anywhere}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(26rem,100%),1fr));gap:1rem}
figure{margin:0;border:1px solid var(--line);border-radius:6px;padding:.5rem 1rem}
figcaption{color:var(--soft);font-size:.87rem}
svg{width:100%;height:auto;font:12px system-ui,sans-serif;fill:var(--text);overflow:visible}
svg .title{font-size:14px;font-weight:600}svg .grid{stroke:var(--line);stroke-width:1}
.table{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .8rem;text-align:right;border-bottom:1px solid var(--line);overflow-wrap:normal}
th:first-child,td:first-child{text-align:left}th{vertical-align:bottom}
.warn{background:var(--warn);padding:.6rem 1rem;border-radius:6px}code{background:var(--code);padding:0 .25rem}
"""
)
_MEASURED = (
    "Requests were sent at the times of the workload, whether or not earlier ones had ended. Every latency counts from "
    "the time when the request was due, so it includes all waiting."
)
_SIMULATED = (
    "No server was measured: the mesh's own policies and memory manager ran the workload in virtual time, with the "
    "step times of its configuration. Every latency counts from the time when the request was due."
)


def page(documents: Sequence[Mapping[str, Any]]) -> str:
    """Returns the page for reports and sweeps. Each run of a sweep is a report of its own."""
    reports = [report for document in documents for report in document.get("reports", [document])]
    title = f"{_kind(reports)}: " + " and ".join(dict.fromkeys(str(document["name"]) for document in documents))
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        '<link rel="icon" href="data:,">',
        '<meta name=viewport content="width=device-width">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{text}</p>" for text in dict.fromkeys(_how(report) for report in reports)),
        *map(_head, documents),
        "<h2>Figures</h2>",
        _table(reports),
    ]
    sweeps = [document for document in documents if "reports" in document]
    if sweeps:
        parts += ["<h2>Latency against load</h2><div class=plots>", *_sweep_plots(sweeps), "</div>"]
    parts += ["<h2>How latency is distributed</h2><div class=plots>", *_distributions(reports), "</div>"]
    if any("slo" in report for report in reports):
        parts += ["<h2>Within a multiple of the unloaded latency</h2><div class=plots>", _slo_plot(reports)]
        parts += [*(_slo_plot_of_models(one) for one in reports if "by_model" in one.get("slo", ())), "</div>"]
    parts += ["<h2>Over time</h2><div class=plots>", *_time_plots(reports), "</div>"]
    for report in reports:
        parts += _groups(report)
    return "".join(parts) + "</body></html>\n"


def _kind(reports: Sequence[Mapping[str, Any]]) -> str:
    kinds = {"simulation" in report for report in reports}
    return "Load test and simulation" if len(kinds) > 1 else "Simulation" if kinds == {True} else "Load test"


def _how(report: Mapping[str, Any]) -> str:
    return _SIMULATED if "simulation" in report else _MEASURED


def _head(document: Mapping[str, Any]) -> str:
    name, date, workload = (escape(str(document[key])) for key in ("name", "date", "workload"))
    target = "" if document["target"] == document["name"] else f"{escape(str(document['target']))}, "
    lines = [f"<p><b>{name}</b>: {target}{date}<br>workload <code>{workload}</code></p>"]
    if document.get("partial"):
        lines.append(f"<p class=warn>Partial: {escape(str(document['partial']))}</p>")
    if document.get("driver_bottleneck"):
        lines.append(f"<p class=warn>Not reliable: {escape(str(document['driver_bottleneck']))}</p>")
    reports = document.get("reports", [document])
    warnings = dict.fromkeys(warning for report in reports for warning in report.get("warnings", ()))
    lines += [f"<p class=warn>Warning: {escape(warning)}</p>" for warning in warnings]
    lines += [_error_table(report) for report in reports if report["errors"]]
    if "highest_rate_within_slo" in document:
        slo, rate = document["slo_wanted"], document["highest_rate_within_slo"]
        lines.append(
            f"<p>Highest rate at which {slo['attainment']:.0%} of the requests stay within {slo['scale']} times their "
            f"unloaded latency: <b>{'none of these rates' if rate is None else f'{rate:g} requests/s'}</b>.</p>"
        )
    return "".join(lines)


def _error_table(report: Mapping[str, Any]) -> str:
    rows = (
        f"<tr><td>{escape(status)}<td>{entry['count']}<td>{escape('; '.join(entry['messages']))}"
        for status, entry in report["errors"].items()
    )
    head = f"<th>{escape(label(report))}<th>requests<th>messages"
    return f"<div class=table><table><tr>{head}{''.join(rows)}</table></div>"


def _table(reports: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{escape(label(report))}" for report in reports)
    rows = []
    for text, key in COLUMNS:
        values = [report.get(key) for report in reports]
        if any(value is not None for value in values):
            rows.append(f"<tr><td>{escape(text)}" + "".join(f"<td>{format_value(value)}" for value in values))
    return f"<div class=table><table><tr><th>{head}{''.join(rows)}</table></div>"


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _distributions(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    shares = np.linspace(0, 1, _POINTS)
    figures = []
    for name, (title, caption) in _DISTRIBUTIONS.items():
        lines = []
        for report in reports:
            values = [value for value in report["requests"][f"{name}_ms"] if value is not None]
            if values:
                lines.append(Line(label(report), np.quantile(values, shares).tolist(), (100 * shares).tolist()))
        svg = plot(title, "ms (logarithmic)", "% of requests at most", lines, log_x=True)
        figures.append(_figure(svg, f"{caption} Further left is better; the height is the share of the requests."))
    return figures


def _time_plots(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    plots = (
        ("output_tokens_per_s", "Throughput", "output tokens / s", "Tokens that arrived in each second."),
        (
            "waiting",
            "Waiting for the first token",
            "requests",
            "A line that keeps rising means that the server is overloaded.",
        ),
        ("running", "Running", "requests", "Requests between their first token and their last."),
    )
    figures = []
    for key, title, y_label, caption in plots:
        lines = [
            Line(label(report), list(range(1, len(report["series"][key]) + 1)), report["series"][key])
            for report in reports
        ]
        figures.append(_figure(plot(title, "seconds", y_label, lines), caption))
    return figures


def _slo_plot(reports: Sequence[Mapping[str, Any]]) -> str:
    lines = [_attainment_line(label(report), report["slo"]) for report in reports if "slo" in report]
    svg = plot("SLO attainment", "multiple of the unloaded latency", "% of requests within", lines)
    return _figure(
        svg, "The share of the requests whose latency is at most this multiple of the latency on an idle server."
    )


def _slo_plot_of_models(report: Mapping[str, Any]) -> str:
    lines = [_attainment_line(name, own) for name, own in report["slo"]["by_model"].items()]
    svg = plot("SLO attainment by model", "multiple of the unloaded latency", "% of requests within", lines)
    return _figure(svg, f"{label(report)}: each model against multiples of its own latency on an idle server.")


def _attainment_line(name: str, slo: Mapping[str, Any]) -> Line:
    shares = slo["attainment"]
    return Line(name, [float(scale) for scale in shares], [100 * share for share in shares.values()], marks=True)


def _sweep_plots(sweeps: Sequence[Mapping[str, Any]]) -> list[str]:
    plots = (
        ("mean_normalized_latency_s_per_token", "Normalized latency", "s / output token"),
        ("median_ttft_ms", "Median time to first token", "ms"),
        ("p99_ttft_ms", "99th percentile of the time to first token", "ms"),
        ("median_tpot_ms", "Median time per output token", "ms"),
        ("output_throughput", "Throughput", "output tokens / s"),
    )
    figures = []
    for key, title, y_label in plots:
        lines = []
        for sweep in sweeps:
            points = [(r["rate"], r[key]) for r in sweep["reports"] if r.get(key) is not None]
            lines.append(Line(str(sweep["name"]), [x for x, _ in points], [y for _, y in points], marks=True))
        figures.append(_figure(plot(title, "requests / s", y_label, lines), "Each point is a run at one rate."))
    return figures


def _groups(report: Mapping[str, Any]) -> list[str]:
    parts = []
    for name in ("model", "tenant", "priority"):
        if groups := report.get(f"by_{name}"):
            named = [{**figures, "name": group} for group, figures in groups.items()]
            parts += [f"<h2>{escape(label(report))}, by {name}</h2>", _table(named)]
    return parts
