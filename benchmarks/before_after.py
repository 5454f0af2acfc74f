"""A benchmark in another checkout and in this one, by turns: `python -m benchmarks.before_after NAME BEFORE [ROUNDS]`.

BEFORE is a checkout with a `.venv` of its own, such as a git worktree of an earlier commit after `make dev`. Prints the
median of each number that the benchmark writes, and the median of the ratios, round by round: the machine's speed
changes from minute to minute. Only what both checkouts measure is compared.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
ROUNDS = 3
Figures = dict[str, float]


def main() -> int:
    """Compares the two checkouts, prints the table and writes it as JSON. Returns the exit code."""
    if len(sys.argv) not in (3, 4):
        print(__doc__, file=sys.stderr)
        return 2
    name, before = sys.argv[1], Path(sys.argv[2]).resolve()
    rounds = int(sys.argv[3]) if len(sys.argv) == 4 else ROUNDS
    runs: list[tuple[Figures, Figures]] = []
    for index in range(rounds):
        order = (before, HERE) if index % 2 == 0 else (HERE, before)
        figures = {checkout: run(checkout, name) for checkout in order}
        runs.append((figures[before], figures[HERE]))
        print(f"round {index + 1} of {rounds} is done", flush=True)
    names = [key for key in runs[0][0] if all(key in one for both in runs for one in both)]
    if not names:
        raise SystemExit(f"the two checkouts have no figure of {name} in common")
    rows = [compare(key, runs) for key in names]
    width = max(len(key) for key in names)
    print(f"\n{'FIGURE'.ljust(width)}  {'BEFORE':>11}  {'AFTER':>11}  AFTER/BEFORE")
    for row in rows:
        print(f"{row['name'].ljust(width)}  {row['before']:>11.4g}  {row['after']:>11.4g}  {row['ratio']:.3f}")
    one_sided = sorted({key for both in runs for one in both for key in one} - set(names))
    if one_sided:
        print(f"\nnot in every run: {', '.join(one_sided)}")
    path = HERE / "build" / "bench" / f"before_after_{name}.json"
    path.write_text(json.dumps({"name": name, "rounds": rounds, "figures": rows}, indent=1) + "\n")
    print(f"\n{path.relative_to(HERE)} written")
    return 0


def run(checkout: Path, name: str) -> Figures:
    """The numbers of one run, by name. A missed bar is no error here."""
    command = [str(checkout / ".venv" / "bin" / "python"), "-m", f"benchmarks.{name}"]
    path = checkout / "build" / "bench" / f"{name}.json"
    path.unlink(missing_ok=True)  # a run that fails must not leave the figures of an earlier one
    result = subprocess.run(
        command, check=False, cwd=checkout, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if not path.exists():
        raise SystemExit(f"{checkout}: benchmarks.{name} wrote no {path.name}\n{result.stderr[-2000:]}")
    report = json.loads(path.read_text())
    bars = {bar["name"]: float(bar["value"]) for bar in report["bars"]}
    return bars | dict(numbers(report["figures"], ()))


def numbers(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    """Every number below ``value`` with its path; a list of numbers is its median."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float):
        yield " / ".join(path), float(value)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, (*path, key))
    elif isinstance(value, list) and value and all(isinstance(one, int | float) for one in value):
        yield " / ".join(path), statistics.median(value)


def compare(key: str, runs: list[tuple[Figures, Figures]]) -> dict[str, Any]:
    """One row: medians, and the median ratio of the pairs."""
    before, after = [one[key] for one, _ in runs], [one[key] for _, one in runs]
    ratios = [b / a if a else float(b == a) for a, b in zip(before, after, strict=True)]
    row = {"before": statistics.median(before), "after": statistics.median(after), "ratio": statistics.median(ratios)}
    return {"name": key, **row}


if __name__ == "__main__":
    sys.exit(main())
