"""Texts of mesh.yaml, and what is wrong with them."""

from __future__ import annotations

from muxmesh.config.load import parse_mesh_config
from muxmesh.errors import ConfigError


def problems(text: str) -> list[str]:
    """One line for each problem, without the name of the file."""
    try:
        parse_mesh_config(text, "")
    except ConfigError as error:
        return [line.removeprefix(":") for line in str(error).splitlines()]
    return []


def units(*fields: str) -> str:
    """mesh.yaml with a unit in each line from 2 on, each with a model `m` unless it has `models`."""
    listed = (unit if "models" in unit else f"{unit}, models: [{{name: m}}]" for unit in fields)
    return "units:\n" + "\n".join(f"  - {{{unit}}}" for unit in listed)


def placed_twice(first: str, second: str) -> str:
    return units(
        f"name: a, cores: [0], models: [{{name: m{first}}}]", f"name: b, cores: [1], models: [{{name: m{second}}}]"
    )
