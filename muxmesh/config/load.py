"""Reads mesh.yaml and reports all errors at once, each with its field and line.

Knows which errors follow from others. YAML is in `yaml_reader`, words are in `field_errors`, the fields and their
limits in `schema`, what does not fit together in `contradictions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from muxmesh.config.contradictions import ORDER_FIELDS, SAME_IN_ALL_UNITS, contradictions
from muxmesh.config.field_errors import field_errors
from muxmesh.config.schema import MeshConfig
from muxmesh.config.section import Location
from muxmesh.config.yaml_reader import read_fields, read_text
from muxmesh.errors import ConfigError
from muxmesh.quoting import named, one_line

Problem = tuple[Location, str]
Check = Callable[[MeshConfig], Iterable[Problem]]
"""Yields the problems of a configuration whose fields are valid each on its own."""

_MODEL_SIZES = frozenset({"kv_pool", "slab", "block_size", "dtype", "max_model_len", "name", "source", "engine"})
_FOR_GPUS = ("mps", "require_ipc", "legacy_ipc", "dtype", "kv_cache_dtype", "cuda_graphs", "continuous_decode_steps")
"""Fields with values that units on CPUs refuse."""
_DEPENDS_ON: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(_FOR_GPUS, frozenset({"device"})),
    "green_contexts": frozenset({"device", "compute_share"}),
    "compute_share": frozenset({"device", "green_contexts"}),
    "source": frozenset({"name", "engine"}),
    "name": frozenset({"source"}),
    "slab": frozenset({"kv_pool"}),
    "kv_pool": frozenset({"slab", "kv_swap", "kv_guaranteed", "device"}),
    "kv_swap": frozenset({"device"}),
    **dict.fromkeys(("block_size", "max_model_len", "default_max_new_tokens"), _MODEL_SIZES),
    "cores": frozenset({"cores"}),
    "threads": frozenset({"cores"}),
    "sim": frozenset({"engine"}),
    "engine": frozenset({"engine"}),
    "host": frozenset({"allow_unencrypted", "internal_tls"}),
    "allow_unencrypted": frozenset({"internal_tls"}),
    "internal_tls": frozenset({"network"}),
    **dict.fromkeys(ORDER_FIELDS, frozenset({"policy"})),
}
"""For the field of a problem: other fields of its section, or of one around or inside it, that the problem is about."""
_COMPARED_IN_ALL_UNITS = frozenset({"cores", "base_port", *SAME_IN_ALL_UNITS})
"""Fields whose problems may be about the same field of another unit."""

_MAX_REPORTED = 100
"""Problems that are listed; the others are counted."""
_MAX_REPAIRS = 10
"""A repair may show errors that were hidden, such as one about two fields. After these no check is certain."""


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration, the file it was read from, and the line of each field in that file."""

    config: MeshConfig
    origin: str
    lines: Mapping[Location, int]

    def refuse(self, problems: Iterable[Problem]) -> None:
        """Raises ConfigError with one line for each problem, in the order of the file. Returns if there are none."""
        described = sorted({_describe(location, problem, self.lines) for location, problem in problems})
        lines = [f"{self.origin}:{line}: {problem}" for line, problem in described[:_MAX_REPORTED]]
        if len(described) > _MAX_REPORTED:
            lines.append(f"{self.origin}: and {len(described) - _MAX_REPORTED} more problems")
        if lines:
            raise ConfigError("\n".join(lines))


def default_config(*checks: Check) -> LoadedConfig:
    """The configuration if there is no mesh.yaml. Raises ConfigError for what ``checks`` find."""
    return checked_config(MeshConfig(), "(default configuration)", *checks)


def checked_config(config: MeshConfig, origin: str, *checks: Check) -> LoadedConfig:
    """A configuration that is from no file. Raises ConfigError, with ``origin``, for its problems."""
    loaded = LoadedConfig(config, origin, {})
    loaded.refuse(problem for check in (contradictions, *checks) for problem in check(config))
    return loaded


def load_mesh_config(path: Path, *checks: Check, variables: Mapping[str, str] | None = None) -> LoadedConfig:
    """Reads the configuration in ``path``. Raises ConfigError with one line for each problem, those of ``checks`` too.

    What a check finds is not reported if it may follow from a field that is invalid by itself. Values may name
    ``variables``, as ``${NAME}`` or ``${NAME:-default}``.
    """
    return parse_mesh_config(read_text(path), str(path), *checks, variables=variables)


def parse_mesh_config(
    text: str, origin: str, *checks: Check, variables: Mapping[str, str] | None = None
) -> LoadedConfig:
    """Like `load_mesh_config`, from text. Error messages start with ``origin``."""
    fields = read_fields(text, origin, variables)
    if fields.data is not None and not isinstance(fields.data, dict):
        raise ConfigError(f"{origin}:1: must be a mapping with fields like `listen` and `units`")
    config, problems, invalid = _validated(fields.data or {}, fields.omitted)
    loaded = LoadedConfig(config, origin, fields.lines)
    found = (problem for check in (contradictions, *checks) for problem in check(config))
    loaded.refuse([*fields.problems, *problems, *(one for one in found if _is_certain(one[0], invalid))])
    return loaded


def with_listen(loaded: LoadedConfig, listen: str) -> LoadedConfig:
    """See `MeshConfig.with_listen`."""
    return LoadedConfig(loaded.config.with_listen(listen), loaded.origin, loaded.lines)


def _validated(data: Any, omitted: Set[Location]) -> tuple[MeshConfig, list[Problem], set[Location]]:
    """The configuration with a default for each invalid field, the problems, and the locations of invalid fields."""
    problems: list[Problem] = []
    invalid = set(omitted)
    names = count(1)
    for _ in range(_MAX_REPAIRS):
        try:
            return MeshConfig.model_validate(data), problems, invalid
        except ValidationError as error:
            found = field_errors(error, MeshConfig)
        before = set(invalid)
        for location, problem in found:
            if problem is not None and not _follows(location, before):
                problems.append((location, problem))
            invalid |= {location, _repair(data, location, f"nameless-{next(names)}")}
    return MeshConfig(), problems, {()}


def _repair(data: dict[str, Any], location: Location, name: str) -> Location:
    """Takes the field at ``location`` out of ``data``: the whole list if it is an item of one.

    A required field gets a value, from ``name``. Returns the location of the field that was changed.
    """
    while location and isinstance(location[-1], int):
        location = location[:-1]
    section: Any = data
    for part in location[:-1]:
        try:
            section = section[part]
        except (KeyError, IndexError):  # taken out before
            return location
    if location and isinstance(section, dict):
        section.pop(location[-1], None)
        required = {"name": name, "models": [{"name": name}]}
        section.update({field: value for field, value in required.items() if field == location[-1]})
    return location


def _follows(location: Location, invalid: Set[Location]) -> bool:
    """True for a problem inside a field that was repaired, or of the section around it: it may miss that field."""
    return any(
        location[: len(other)] == other or (len(location) > 0 and other[: len(location)] == location)
        for other in invalid
    )


def _is_certain(location: Location, invalid: Set[Location]) -> bool:
    """False if a problem at ``location`` may follow from an invalid field, for which a default stands."""
    name = _field_name(location)
    for other in invalid:
        length = min(len(location), len(other))
        if location[:length] == other[:length]:
            return False
        other_name = _field_name(other)
        if other_name == name and name in _COMPARED_IN_ALL_UNITS:
            return False
        is_near = location[: len(other) - 1] == other[:-1] or other[: len(location) - 1] == location[:-1]
        if is_near and other_name in _DEPENDS_ON.get(name, ()):
            return False
    return True


def _field_name(location: Location) -> str:
    """The last name in a location: that of the list for one of its items."""
    return next((part for part in reversed(location) if isinstance(part, str)), "")


def _describe(location: Location, problem: str, lines: Mapping[Location, int]) -> tuple[int, str]:
    """The line of the field or of its nearest parent in the file, and the message with the path of the field."""
    known = location
    while known and known not in lines:
        known = known[:-1]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{named(part)}" for part in location).lstrip(".")
    message = f"{field}: {problem}" if field else problem
    return lines.get(known, 1), one_line(message)
