"""Reads a YAML file of limited size into plain values, with the line of each field.

A value may name variables (`muxmesh/config/variables.py`); what stands for one is a single value, whatever it contains.

Bounded: size of the file, nesting, and the values that aliases expand to. Values are null, booleans, numbers, text,
lists and mappings with text as keys; every other tag is refused. Knows no field of the configuration.
"""

from __future__ import annotations

import os
import select
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from muxmesh.config.section import Location
from muxmesh.config.variables import with_variables
from muxmesh.errors import ConfigError
from muxmesh.quoting import named

MAX_FILE_BYTES = 256 * 1024
MAX_DEPTH = 20
"""Lists and mappings around a value."""
MAX_VALUES = 10_000
"""Values of a file after aliases and merge keys are expanded."""

_TAG = "tag:yaml.org,2002:"
_BOOLEANS = yaml.constructor.SafeConstructor.bool_values
_OMITTED = object()
"""Stands for a value that is refused. Its field is left out of its mapping."""


@dataclass(slots=True)
class YamlFields:
    """The content of a file. ``problems``: (location, problem) of what is refused; ``omitted``: fields left out."""

    data: Any = None
    lines: dict[Location, int] = field(default_factory=dict)
    problems: list[tuple[Location, str]] = field(default_factory=list)
    omitted: set[Location] = field(default_factory=set)


def read_text(path: Path, longest_wait_s: float = 30) -> str:
    """Reads a file or a pipe of at most `MAX_FILE_BYTES` in UTF-8.

    Raises ConfigError, also if nothing is written to a pipe for ``longest_wait_s``.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(fd).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
                raise ConfigError(f"{path}: cannot be read: it is neither a regular file nor a pipe")
            content = _read(fd, path, longest_wait_s)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:  # ValueError: a zero in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be read: {reason}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_FILE_BYTES} bytes, the limit of a configuration")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8: byte 0x{content[error.start]:02x}") from error


def _read(fd: int, path: Path, longest_wait_s: float) -> bytes:
    """Reads up to the end, or one byte more than the limit. Polls: a pipe that has no writer yet reads as ended."""
    content = b""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while len(content) <= MAX_FILE_BYTES:
        if not poll.poll(longest_wait_s * 1000):
            raise ConfigError(f"{path}: cannot be read: nothing is written to this pipe for {longest_wait_s:g} s")
        piece = os.read(fd, MAX_FILE_BYTES + 1 - len(content))
        if not piece:
            break
        content += piece
    return content


def read_fields(text: str, origin: str, variables: Mapping[str, str] | None = None) -> YamlFields:
    """Parses ``text``, whose values may name ``variables``.

    Raises ConfigError, which names ``origin`` and the line, if it is not YAML or not bounded.
    """
    try:
        root = _BoundedLoader(text).get_single_node()
        expansion = _Expansion(variables or {})
        if root is not None:
            expansion.found.data = expansion.value(root, (), ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{origin}:{line}: not YAML: {_problem_of(error)}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{origin}:{line}: not YAML: the character U+{ord(text[error.position]):04X}") from error
    except _NotBoundedError as error:
        raise ConfigError(f"{origin}:{error.line}: {error.problem}") from error
    return expansion.found


def _problem_of(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "it cannot be parsed"
    if "'\\t'" in problem:
        return f"{problem}; indent with spaces"
    if "another document" in problem:
        return "a second document begins; one is needed"
    return problem


class _NotBoundedError(Exception):
    def __init__(self, node: yaml.Node | yaml.Event, problem: str) -> None:
        self.line = node.start_mark.line + 1 if node.start_mark else 1
        self.problem = problem


class _BoundedLoader(yaml.SafeLoader):
    """Composes nodes up to `MAX_DEPTH`. Dates and numbers in base 60 stay text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """See yaml.composer."""
        if self._depth > MAX_DEPTH:
            raise self._not_bounded(f"is nested more than {MAX_DEPTH} deep")
        if self._num_nodes > 2 * MAX_VALUES:
            raise self._not_bounded(f"has more than {MAX_VALUES} values")
        self._depth += 1
        self._num_nodes += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def resolve(self, kind: type[yaml.Node], value: str, implicit: tuple[bool, bool]) -> str:
        """See yaml.resolver."""
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        is_text = tag in (_TAG + "timestamp", _TAG + "value") or (
            tag in (_TAG + "int", _TAG + "float") and ":" in value
        )
        return _TAG + "str" if is_text else tag

    def _not_bounded(self, problem: str) -> _NotBoundedError:
        return _NotBoundedError(self.peek_event(), problem)  # type: ignore[no-untyped-call]


def _with_variables(node: yaml.ScalarNode, variables: Mapping[str, str]) -> yaml.ScalarNode:
    """The node as if the values of the variables stood in the file. Without quotes it may become a number."""
    text = with_variables(node.value, variables)
    is_plain = node.style is None and node.tag == _TAG + "str"
    tag = _BoundedLoader("").resolve(yaml.ScalarNode, text, (True, False)) if is_plain else node.tag
    return yaml.ScalarNode(tag, text, node.start_mark, node.end_mark, node.style)


class _Expansion:
    """Turns nodes into values. Each alias becomes a value of its own."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.found = YamlFields()
        self._variables = variables
        self._num_values = 0

    def value(self, node: yaml.Node, location: Location, parents: tuple[yaml.Node, ...]) -> Any:
        """Returns the value of a node, or `_OMITTED`."""
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            raise _NotBoundedError(node, f"has more than {MAX_VALUES} values, after aliases are expanded")
        self.found.lines.setdefault(location, node.start_mark.line + 1)
        if node in parents:
            return self._refuse(location, "is an alias of a field that contains it")
        if len(parents) > MAX_DEPTH:
            raise _NotBoundedError(node, f"is nested more than {MAX_DEPTH} deep by aliases")
        inside = (*parents, node)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, location, inside)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            items = [self.value(item, (*location, index), inside) for index, item in enumerate(node.value)]
            return [None if item is _OMITTED else item for item in items]
        if isinstance(node, yaml.ScalarNode) and node.tag.removeprefix(_TAG) in ("null", "bool", "int", "float", "str"):
            return self._scalar(node, location)
        tag = named(node.tag.replace(_TAG, "!!"))
        return self._refuse(location, f"has the tag {tag}, which is not supported; write a plain value")

    def _mapping(self, node: yaml.MappingNode, location: Location, inside: tuple[yaml.Node, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        first_lines: dict[str, int] = {}
        merged: list[tuple[yaml.Node, yaml.Node]] = []
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                merged.append((key_node, value_node))
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                line = key_node.start_mark.line + 1
                self.found.problems.append((location, f"has a list or a mapping as a field name in line {line}"))
                continue
            name = key_node.value
            self._add(found, name, value_node, key_node, location, inside)
            if name in first_lines:
                problem = f"is a duplicate of the field in line {first_lines[name]}"
                self.found.problems.append(((*location, name), problem))
            first_lines.setdefault(name, key_node.start_mark.line + 1)
        for key_node, value_node in merged:
            for name, entry in self._merged(value_node, location, inside):
                if name not in found and (*location, name) not in self.found.omitted:
                    self._add(found, name, entry, key_node, location, inside)
        return found

    def _add(
        self,
        found: dict[str, Any],
        name: str,
        node: yaml.Node,
        key_node: yaml.Node,
        location: Location,
        inside: tuple[yaml.Node, ...],
    ) -> None:
        """Adds one field to ``found``."""
        inner = (*location, name)
        self.found.lines[inner] = key_node.start_mark.line + 1
        if (value := self.value(node, inner, inside)) is not _OMITTED:
            found[name] = value

    def _merged(
        self, node: yaml.Node, location: Location, inside: tuple[yaml.Node, ...]
    ) -> Iterator[tuple[str, yaml.Node]]:
        """(name, value) of each field that ``<<: node`` adds, the first of equal names being the one that counts."""
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            raise _NotBoundedError(node, f"has more than {MAX_VALUES} values, after merge keys are expanded")
        if node in inside or len(inside) > MAX_DEPTH:
            self._refuse((*location, "<<"), "merges a mapping that contains it, or too many inside each other")
        elif isinstance(node, yaml.MappingNode):
            own = [(key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
            yield from ((key.value, value) for key, value in own if key.tag != _TAG + "merge")
            for key, value in own:
                if key.tag == _TAG + "merge":
                    yield from self._merged(value, location, (*inside, node))
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                yield from self._merged(item, location, (*inside, node))
        else:
            self._refuse((*location, "<<"), "must be an alias of a mapping, or a list of aliases")

    def _scalar(self, node: yaml.ScalarNode, location: Location) -> Any:
        if "${" in node.value:
            try:
                node = _with_variables(node, self._variables)
            except ValueError as error:
                return self._refuse(location, str(error))
        kind, text = node.tag.removeprefix(_TAG), node.value
        if kind == "str":
            return text
        if kind == "null":
            return None
        try:
            if kind == "bool":
                return _BOOLEANS[text.lower()]
            constructor = yaml.constructor.SafeConstructor()
            return constructor.construct_yaml_int(node) if kind == "int" else constructor.construct_yaml_float(node)
        except (KeyError, IndexError, ValueError):  # an explicit tag that does not fit; too many digits
            return self._refuse(location, f"cannot be read as !!{kind}")

    def _refuse(self, location: Location, problem: str) -> object:
        self.found.problems.append((location, problem))
        self.found.omitted.add(location)
        return _OMITTED
