"""The options of `muxmesh loadtest`. It imports little, because the parser is built for every command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from loadtest.spec import HELP as WORKLOAD_HELP
from muxmesh.cli import argument_types
from muxmesh.quoting import quoted

DESCRIPTION = "Send load to a mesh or an OpenAI-compatible server. Latencies count from when a request was due."


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a list of rates, such as 0.5,1,2")
    return rates


def _number_from(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdigit() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{quoted(text)} is not a whole number from {least} to {most}")
        return int(text)

    return parse


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number above 0 and at most 1")
    return share


def _share_from_zero(text: str) -> float:
    return 0.0 if text.strip() in {"0", "0.0"} else _share(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number of seconds above 0")
    return seconds


def add_to(load: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the options of `muxmesh loadtest` and returns the parser of its subcommand `compare`."""
    load.formatter_class = argparse.RawDescriptionHelpFormatter
    load.epilog = f"a workload is one line of settings:\n{WORKLOAD_HELP}"
    load.set_defaults(action="run")
    load.add_argument("--openai", metavar="URL", help="drive an OpenAI-compatible server instead of a mesh")
    load.add_argument("--workload", metavar="SPEC", help="which requests are sent when; see below")
    load.add_argument(
        "--max-concurrency", type=_number_from(1, 1 << 20), metavar="N", help="most requests in flight; others wait"
    )
    load.add_argument(
        "--temperature", type=argument_types.number, metavar="T", help="temperature (default: the server's own)"
    )
    load.add_argument("--timeout", type=_seconds, metavar="SECONDS", help="deadline of each request")
    load.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="METRIC:MS",
        help="latency limits of a good request, such as ttft:500 tpot:50 e2el:5000",
    )
    load.add_argument(
        "--calibrate",
        type=_number_from(0, 1000),
        metavar="N",
        help="requests of each model sent one by one before the test, to measure the unloaded latency (default 5; 0: "
        "none, and no attainment of multiples of it)",
    )
    load.add_argument(
        "--unloaded", type=Path, metavar="JSON", help="read the unloaded latency from this report instead"
    )
    load.add_argument(
        "--sweep", type=_rates, metavar="R1,R2", help="run the workload at these rates instead of its own"
    )
    load.add_argument(
        "--slo-scale",
        type=_number_from(1, 16),
        metavar="X",
        help="SLO of a sweep, as a multiple of the unloaded latency (default 5)",
    )
    load.add_argument(
        "--slo-attainment",
        type=_share,
        metavar="P",
        help="share of requests within the SLO that a sweep requires (default 0.9)",
    )
    load.add_argument("--name", metavar="NAME", help="name of the system in reports (default: its kind and address)")
    load.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the whole report as JSON")
    load.add_argument("--html", type=Path, metavar="FILE", help="write the report as an HTML page")
    load.add_argument(
        "--vocabulary",
        type=_number_from(32, 1 << 20),
        metavar="N",
        help="vocabulary size of an OpenAI-compatible server (default 32000)",
    )
    load.add_argument(
        "--cache-salt",
        metavar="SALT",
        help="requests share cached prefixes only with those of the same salt (default: a new one for each run, if the "
        "server takes salts; empty: none)",
    )
    load.add_argument(
        "--max-failed",
        type=_share_from_zero,
        metavar="P",
        help="exit with 1 if more than this share of the requests failed (default: only if all failed)",
    )
    load.add_argument("--allow-slow-driver", action="store_true", help="report even if the driver was the bottleneck")
    load.add_argument("--quiet", action="store_true", help="print no progress on stderr")
    compare = load.add_subparsers(metavar="compare").add_parser(
        "compare", help="compare reports", description="Print reports side by side, with ratios to the first."
    )
    compare.set_defaults(action="compare", module="loadtest")
    compare.add_argument("files", nargs="+", type=Path, metavar="REPORT.json")
    compare.add_argument("--html", type=Path, metavar="FILE", help="write an HTML page")
    return compare
