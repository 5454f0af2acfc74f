"""Runs one check in this process: `python -m benchmarks.gpu_check.checks NAME`. Exit code 1 if it fails."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.gpu_check.check import Findings
from benchmarks.gpu_check.checks import load


def main() -> int:
    """Runs the check. An exception of it is a failure, with its traceback in the output."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.checks", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--findings", type=Path, help="file for what it finds, as JSON")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: fake driver, interpreted kernels, tiny")
    arguments = parser.parse_args()
    findings = Findings(arguments.findings)
    load(arguments.name)(findings, arguments.dry_run)
    return 0 if findings.hold else 1


if __name__ == "__main__":
    sys.exit(main())
