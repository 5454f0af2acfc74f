"""The result of a benchmark: a table for people, JSON for programs."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parent.parent / "build" / "bench"


@dataclass
class Report:
    """Raw figures, and bars: figures with a target. A missed bar is written as missed."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    bars: list[dict[str, Any]] = field(default_factory=list)

    def bar(self, name: str, value: float, target: str, ok: bool) -> None:
        """Adds one bar. ``target`` describes the required value."""
        self.bars.append({"name": name, "value": value, "target": target, "ok": ok})

    def write(self) -> bool:
        """Prints the table and writes the JSON; True if every bar holds."""
        OUT.mkdir(parents=True, exist_ok=True)
        machine = {"cpu": _cpu(), "python": platform.python_version()}
        content: Mapping[str, Any] = {"name": self.name, "machine": machine, "bars": self.bars, "figures": self.figures}
        path = OUT / f"{self.name}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
        width = max(len(bar["name"]) for bar in self.bars)
        print(f"\n{'BAR'.ljust(width)}  {'VALUE':>12}  TARGET")
        for bar in self.bars:
            verdict = "ok" if bar["ok"] else "MISSED"
            print(f"{bar['name'].ljust(width)}  {bar['value']:>12.4g}  {bar['target']}  {verdict}")
        print(f"\n{path.relative_to(OUT.parent.parent)} written")
        return all(bar["ok"] for bar in self.bars)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
