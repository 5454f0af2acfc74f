"""Reports as text: the table of one run, and several runs side by side with ratios. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

COLUMNS = (
    ("Successful requests", "completed"),
    ("Failed requests", "failed"),
    ("Interrupted requests", "interrupted"),
    ("Benchmark duration (s)", "duration"),
    ("Total input tokens", "total_input_tokens"),
    ("Total cached input tokens", "total_cached_tokens"),
    ("Total generated tokens", "total_output_tokens"),
    ("Request throughput (req/s)", "request_throughput"),
    ("Rate-weighted throughput (req/s)", "rate_weighted_throughput"),
    ("Request goodput (req/s)", "request_goodput"),
    ("SLO attainment (share)", "slo_attainment"),
    ("SLO attainment, TTFT only (share)", "slo_ttft_attainment"),
    ("SLO attainment, TPOT only (share)", "slo_tpot_attainment"),
    ("SLO attainment, end to end (share)", "slo_e2el_attainment"),
    ("Output token throughput (tok/s)", "output_throughput"),
    ("Peak output token throughput (tok/s)", "max_output_tokens_per_s"),
    ("Peak concurrent requests", "max_concurrent_requests"),
    ("Total token throughput (tok/s)", "total_token_throughput"),
    *(
        (f"{word} {metric.upper()} (ms)", f"{key}_{metric}_ms")
        for metric in ("ttft", "tpot", "itl", "e2el")
        for word, key in (("Mean", "mean"), ("Median", "median"), ("P90", "p90"), ("P99", "p99"))
    ),
    ("Longest ITL (ms)", "max_itl_ms"),
    ("Median time inside the router (ms)", "median_router_ms"),
    ("P99 time inside the router (ms)", "p99_router_ms"),
    ("Mean normalized latency (s/token)", "mean_normalized_latency_s_per_token"),
    ("P99 normalized latency (s/token)", "p99_normalized_latency_s_per_token"),
)
"""(label as in `vllm bench serve`, key in a report)."""
_SWEEP_COLUMNS = (
    ("rate (req/s)", "rate"),
    ("done", "completed"),
    ("failed", "failed"),
    ("req/s", "request_throughput"),
    ("output tok/s", "output_throughput"),
    ("median TTFT (ms)", "median_ttft_ms"),
    ("p99 TTFT (ms)", "p99_ttft_ms"),
    ("median TPOT (ms)", "median_tpot_ms"),
    ("median E2EL (ms)", "median_e2el_ms"),
)
_WIDTH = 40


def format_value(value: float | None) -> str:
    """Formats a figure with two decimals, or four below 1; None is -."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"


def label(report: Mapping[str, Any]) -> str:
    """The name of a report, with its rate if it has one."""
    rate = report.get("rate")
    return f"{report['name']} at {rate:g}/s" if rate is not None else str(report["name"])


def title(report: Mapping[str, Any]) -> str:
    """The name of a report, its rate, and what was measured, which may be its name."""
    name, target = str(report["name"]), str(report["target"])
    return label(report) if name == target else f"{label(report)}: {target}"


def rows_of(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (label, formatted figure) for each column that the report has."""
    for text, key in COLUMNS:
        if report.get(key) is not None:
            yield text, format_value(report[key])


def render(report: Mapping[str, Any]) -> str:
    """Returns the table of one run."""
    lines = [f" {title(report)} ".center(_WIDTH + 12, "=")]
    if report["partial"]:
        lines.append(f"PARTIAL: {report['partial']}")
    lines += [f"WARNING: {warning}" for warning in report.get("warnings", ())]
    lines += [f"{text + ':':<{_WIDTH}} {value}" for text, value in rows_of(report)]
    if slo := report.get("slo"):
        lines.append(f"{'Within a multiple of unloaded latency:':<{_WIDTH}} {_scales(slo)}")
        lines += [f"{f'  {name}:':<{_WIDTH}} {_scales(own)}" for name, own in slo.get("by_model", {}).items()]
    for name, limits in report.get("configured_slo", {}).items():
        lines.append(f"{f'SLO of {name}:':<{_WIDTH}} {', '.join(f'{key} {value:g}' for key, value in limits.items())}")
    if "simulation" not in report:  # a simulation has no driver
        driver = report["driver"]
        usage = f"{driver['cpu_share']:.1%} of a core, {driver['p99_lag_ms']:.1f} ms late (p99)"
        lines.append(f"{'The driver itself:':<{_WIDTH}} {usage}")
    for status, entry in report["errors"].items():
        lines.append(f"{entry['count']} x {status}: {entry['messages'][0] if entry['messages'] else ''}")
    for name in ("model", "tenant", "priority"):
        for group, figures in report.get(f"by_{name}", {}).items():
            lines.append(
                f"{name} {group}: {figures['completed']} done, {figures['failed']} failed, "
                f"TTFT {format_value(figures['median_ttft_ms'])} / {format_value(figures['p99_ttft_ms'])} ms, "
                f"E2EL {format_value(figures['median_e2el_ms'])} / {format_value(figures['p99_e2el_ms'])} ms "
                f"(median / p99){_attained(figures)}"
            )
    return "\n".join(lines)


def _scales(slo: Mapping[str, Any]) -> str:
    parts = (f"{scale}x {part:.0%}" for scale, part in slo["attainment"].items() if int(scale) in {1, 2, 4, 8, 16})
    return ", ".join(parts)


def _attained(figures: Mapping[str, Any]) -> str:
    share = figures.get("slo_attainment")
    return "" if share is None else f", SLO met by {share:.1%}"


def compare(reports: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of several reports, with the ratio of each figure to that of the first report."""
    header = ["", *map(label, reports)]
    rows = [header]
    for text, key in COLUMNS:
        values = [report.get(key) for report in reports]
        if all(value is None for value in values):
            continue
        cells = [format_value(values[0])]
        for value in values[1:]:
            ratio = f" ({value / values[0]:.2f}x)" if value is not None and values[0] else ""
            cells.append(format_value(value) + ratio)
        rows.append([text, *cells])
    return _aligned(rows) + "".join(f"\n\n{warning}" for warning in _warnings(reports))


def render_sweep(sweep: Mapping[str, Any]) -> str:
    """Returns the table of a sweep: a line for each rate, and the highest one within the SLO."""
    scale, wanted = sweep["slo_wanted"]["scale"], sweep["slo_wanted"]["attainment"]
    rows = [[*(text for text, _ in _SWEEP_COLUMNS), f"within {scale}x unloaded"]]
    for report in sweep["reports"]:
        attainment = {int(key): share for key, share in report["slo"]["attainment"].items()}  # JSON has keys of text
        rows.append([*(format_value(report[key]) for _, key in _SWEEP_COLUMNS), f"{attainment[scale]:.0%}"])
    highest = sweep["highest_rate_within_slo"]
    found = "none of these" if highest is None else f"{highest:g}/s"
    return f"{_aligned(rows)}\n\nHighest rate within the SLO ({wanted:.0%} within {scale}x unloaded): {found}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _warnings(reports: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Why ratios are not meaningful: the workloads differ, or a driver was too slow."""
    workloads = dict.fromkeys(str(report["workload"]) for report in reports)
    if len(workloads) > 1:
        yield "Not the same workload:\n" + "\n".join(f"  {workload}" for workload in workloads)
    for report in reports:
        if report.get("driver_bottleneck"):
            yield f"NOT RELIABLE: {label(report)}: {report['driver_bottleneck']}"
