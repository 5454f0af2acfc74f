"""Overhead and contention of the replays, and how MuxServe's authors measured. Stored in `fitted.yaml`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from muxmesh.errors import ConfigError

PATH = Path(__file__).with_name("fitted.yaml")


@dataclass(frozen=True, slots=True)
class Constants:
    """See `fitted.yaml` for what each one is derived from."""

    contention: float
    """Beside workers whose shares sum to o, a step takes ``1 + contention * o`` times as long."""
    overhead: float
    """A step of the prototype takes ``1 + overhead`` times the time in the profile."""
    device_memory_bytes: float
    """Of one GPU."""
    memory_fraction: float
    """The part of it that weights and KV have; the processes of the prototype need the rest."""
    mean_prompt_tokens: float
    """Of the synthetic workloads."""
    mean_output_tokens: float
    longest_output_tokens: float
    """Outputs of all measured runs are spread like an exponential distribution that ends there."""
    baseline_max_num_seqs: int
    """Sequences of one model at the same time in the `spatial` and `temporal` baselines."""


def read_constants(path: Path = PATH) -> Constants:
    """Raises ConfigError, which names the file and the field."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    names = [one.name for one in fields(Constants)]
    if not isinstance(content, dict) or sorted(content) != sorted(names):
        raise ConfigError(f"{path}: needs exactly these fields: {', '.join(names)}")
    for name in names:
        value = content[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ConfigError(f"{path}: {name}: is {value!r}; a number of at least 0 is needed")
    return Constants(**content)
