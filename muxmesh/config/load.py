"""Parses mesh.yaml and reports all errors at once, each with its field and line.

Knows YAML and line numbers. The fields and their limits are in `schema`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from muxmesh.config.schema import Location, MeshConfig, contradictions
from muxmesh.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration, the file it was read from, and the line of each field in that file."""

    config: MeshConfig
    origin: str
    lines: Mapping[Location, int]

    def refuse(self, problems: Iterable[tuple[Location, str]]) -> None:
        """Raises ConfigError with one line for each problem, in the order of the file. Returns if there are none."""
        described = sorted(_describe(location, problem, self.lines) for location, problem in problems)
        if described:
            raise ConfigError("\n".join(f"{self.origin}:{line}: {problem}" for line, problem in described))


def default_config() -> LoadedConfig:
    """The configuration if there is no mesh.yaml."""
    return LoadedConfig(MeshConfig(), "(default configuration)", {})


def load_mesh_config(path: Path) -> LoadedConfig:
    """Reads the configuration in ``path``. Raises ConfigError with one line for each problem."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return parse_mesh_config(text, str(path))


def parse_mesh_config(text: str, origin: str) -> LoadedConfig:
    """Like `load_mesh_config`, from text. Error messages start with ``origin``."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ConfigError(f"{origin}:{line}: not YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # a control character, an invalid date
        raise ConfigError(f"{origin}: not YAML: {error}") from error
    lines: dict[Location, int] = {}
    problems = list(_walk(root, (), lines)) if root is not None else []
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"{origin}:1: must be a mapping with fields like `listen` and `units`")
    config = MeshConfig()
    try:
        config = MeshConfig.model_validate(data or {})
        problems += contradictions(config)
    except ValidationError as error:
        problems += _problems(error)
    loaded = LoadedConfig(config, origin, lines)
    loaded.refuse(problems)
    return loaded


def _problems(error: ValidationError) -> list[tuple[Location, str]]:
    """(location, problem) of each error, without the `too_short` that pydantic adds to a list of invalid items."""
    found = [(tuple(item["loc"]), item["type"], item["msg"].removeprefix("Value error, ")) for item in error.errors()]
    return [
        (location, message)
        for location, kind, message in found
        if kind != "too_short"
        or not any(len(other) > len(location) and other[: len(location)] == location for other, _, _ in found)
    ]


def with_listen(loaded: LoadedConfig, listen: str) -> LoadedConfig:
    """Replaces the address of the public API. Raises ConfigError if ``listen`` is not HOST:PORT."""
    try:
        config = MeshConfig.model_validate({**loaded.config.model_dump(exclude_unset=True), "listen": listen})
    except ValidationError as error:
        raise ConfigError(f"listen: is {listen!r}; HOST:PORT is needed") from error
    return LoadedConfig(config, loaded.origin, loaded.lines)


def _walk(
    node: yaml.Node, location: Location, lines: dict[Location, int], parents: tuple[yaml.Node, ...] = ()
) -> Iterator[tuple[Location, str]]:
    """Adds the line of each field to ``lines``. Yields (location, problem) of duplicate and recursive fields."""
    lines.setdefault(location, node.start_mark.line + 1)
    if node in parents:
        yield location, "is an alias of a field that contains it"
        return
    parents = (*parents, node)
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            inner = (*location, key_node.value)
            if inner in lines:
                yield inner, f"is a duplicate of the field in line {lines[inner]}"
            lines[inner] = key_node.start_mark.line + 1
            yield from _walk(value_node, inner, lines, parents)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _walk(item, (*location, index), lines, parents)


def _describe(location: Location, problem: str, lines: Mapping[Location, int]) -> tuple[int, str]:
    """The line of the field or of its nearest parent in the file, and the message with the path of the field."""
    known = location
    while known and known not in lines:
        known = known[:-1]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    return lines.get(known, 1), f"{field}: {problem}" if field else problem
