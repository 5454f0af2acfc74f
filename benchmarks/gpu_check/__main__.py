"""`python -m benchmarks.gpu_check`: runs the table, writes JSON after each check, prints a summary.

Exit code 1 if a check failed or did not run.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from benchmarks import report
from benchmarks.gpu_check.check import Check, Result
from benchmarks.gpu_check.runner import command_of, run_checks
from benchmarks.gpu_check.table import CHECKS, dry_checks

OUT = report.OUT.parent / "gpu-check"
BUDGET_S = 600.0


def chosen(checks: Sequence[Check], only: Sequence[str], skip: Sequence[str]) -> list[Check]:
    """The checks to run, in the table's order. Raises SystemExit for a name that no check has."""
    names = [check.name for check in checks]
    if unknown := [name for name in (*only, *skip) if name not in names]:
        raise SystemExit(f"no check has the name {unknown[0]}; checks: {', '.join(names)}")
    return [check for check in checks if (not only or check.name in only) and check.name not in skip]


def machine(is_dry_run: bool) -> AbstractContextManager[None]:
    """The GPU that checks find while the block runs: the real one, or the fake one with interpreted kernels."""
    if not is_dry_run:
        return nullcontext()
    from tests.support.gpu_machine import gpu_machine  # noqa: PLC0415 - imports pytest, which not every check needs

    return gpu_machine()


def line(result: Result) -> str:
    """One line for people: state, time, and every comparison that does not hold, or the expectation."""
    missed = [one for one in result.comparisons if not one["holds"]]
    reasons = [f"{'aim missed' if one.get('is_aim') else 'NOT'}: {one['what']} ({one['value']})" for one in missed]
    if result.state == "failed" and not reasons:
        reasons = [result.output.strip().rpartition("\n")[2][:300]]
    return f"{result.state:10} {result.seconds:6.1f} s  {result.name:22} {'; '.join(reasons) or result.expected}"


def summary(results: Sequence[Result]) -> str:
    """The table of all results, and the end of the output of those that failed."""
    failed = [result for result in results if result.state != "passed"]
    chars = 9000 // max(1, len(failed))
    parts = [f"--- {result.name}: {result.state}\n{result.output[-min(chars, 3000) :]}" for result in failed]
    counts = f"{len(results) - len(failed)} of {len(results)} checks passed"
    return "\n".join([*parts, *(line(result) for result in results), counts])


def main() -> int:
    """Runs the checks. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--output", type=Path, default=OUT, help="folder for gpu_check.json and what checks keep")
    parser.add_argument("--only", default="", metavar="NAMES", help="names of checks, separated by commas")
    parser.add_argument("--skip", default="", metavar="NAMES", help="names of checks to leave out")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for all of them; default %(default)s")
    parser.add_argument(
        "--dry-run", action="store_true", help="on the fake driver, where a check can: tests the checks"
    )
    parser.add_argument("--list", action="store_true", help="print the table and exit")
    arguments = parser.parse_args()
    names = [tuple(filter(None, text.split(","))) for text in (arguments.only, arguments.skip)]
    checks = chosen(dry_checks() if arguments.dry_run else CHECKS, *names)
    if arguments.list:
        print("\n".join(f"{check.name:22} {check.limit_s:4.0f} s  {check.use:7} {check.expected}" for check in checks))
        return 0
    arguments.output.mkdir(parents=True, exist_ok=True)
    started_at_s = time.monotonic()
    command = functools.partial(command_of, is_dry_run=arguments.dry_run)
    with machine(arguments.dry_run):
        results = asyncio.run(
            run_checks(
                checks, arguments.output, arguments.budget_s, command, lambda result: print(line(result), flush=True)
            )
        )
    print(f"\n{summary(results)}; {time.monotonic() - started_at_s:.0f} s; {arguments.output}/gpu_check.json written")
    return 0 if all(result.state == "passed" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
