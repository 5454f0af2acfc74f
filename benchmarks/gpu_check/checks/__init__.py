"""The checks that are functions, by name. Each takes its findings, and whether it runs without a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from benchmarks.gpu_check.check import Findings

MODULES = {
    "memory": ("ipc", "dlpack", "memfd"),
    "mps": ("mps-shares", "mps-faults", "mps-answers"),
    "meshes": ("mesh-tokens", "swap", "hand-off"),
    "mesh_faults": ("group-restart", "unlimited-worker"),
    "share_values": ("shares-values", "shares-tokens"),
    "engine": ("graphs", "attention", "green", "sanitizer"),
}
"""Module of this package → the checks in it, each a function of the same name with underscores."""


def load(name: str) -> Callable[[Findings, bool], None]:
    """The function of a check. Imports its module only, so that no check pays for what another imports."""
    module = next(module for module, names in MODULES.items() if name in names)
    found: Callable[[Findings, bool], None] = getattr(
        importlib.import_module(f"benchmarks.gpu_check.checks.{module}"), name.replace("-", "_")
    )
    return found
