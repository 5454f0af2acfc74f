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
    """Raw figures, and bars: figures for the table. A bar has what it must be, what it aims at, both or neither."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    bars: list[dict[str, Any]] = field(default_factory=list)

    def bar(
        self,
        name: str,
        value: float,
        target: str = "",
        ok: bool | None = None,
        aim: str = "",
        is_reached: bool | None = None,
    ) -> None:
        """Adds one bar. ``target`` describes the required value and ``ok`` tells whether it is; the same for an aim."""
        assert bool(target) == (ok is not None) and bool(aim) == (is_reached is not None), name
        self.bars.append(
            {"name": name, "value": value, "target": target, "ok": ok, "aim": aim, "is_reached": is_reached}
        )

    def table(self) -> str:
        """One line for each bar: whether the required value is met or MISSED, and the aim reached or not."""
        width = max(len(bar["name"]) for bar in self.bars)
        rows = [f"{'BAR'.ljust(width)}  {'VALUE':>12}  REQUIRED AND AIM"]
        for bar in self.bars:
            verdicts = [f"{bar['target']}: {'ok' if bar['ok'] else 'MISSED'}"] if bar["target"] else []
            if bar["aim"]:
                verdicts.append(f"aim {bar['aim']}: {'reached' if bar['is_reached'] else 'not reached'}")
            rows.append(f"{bar['name'].ljust(width)}  {bar['value']:>12.4g}  {'; '.join(verdicts)}".rstrip())
        return "\n".join(rows)

    def holds(self) -> bool:
        """True if every required value is met. Aims do not count."""
        return all(bar["ok"] is not False for bar in self.bars)

    def write(self) -> bool:
        """Prints the table and writes the JSON; returns `holds`."""
        path = self.save()
        print(f"\n{self.table()}\n\n{path.relative_to(OUT.parent.parent)} written")
        return self.holds()

    def save(self) -> Path:
        """Writes the JSON, also that of a benchmark that still runs; returns its path."""
        OUT.mkdir(parents=True, exist_ok=True)
        machine = {"cpu": _cpu(), "python": platform.python_version()}
        content: Mapping[str, Any] = {"name": self.name, "machine": machine, "bars": self.bars, "figures": self.figures}
        path = OUT / f"{self.name}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
