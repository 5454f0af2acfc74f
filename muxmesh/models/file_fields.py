"""The fields of a model's file, each checked as it is read: nothing in a file is taken on trust. Reads no files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muxmesh.errors import ModelUnsupported
from muxmesh.models.model_files import described
from muxmesh.quoting import named


@dataclass(frozen=True, slots=True)
class FileFields:
    """The fields of one object in the file ``origin``; ``path`` is that of the object, such as ``rope_scaling.``.

    A field that is null counts as missing, as in transformers. Each method raises ModelUnsupported, as
    `FILE: field: problem`.
    """

    origin: Path
    values: Mapping[str, Any]
    path: str = ""

    def refuse(self, name: str, problem: str) -> ModelUnsupported:
        """The error for a field."""
        return ModelUnsupported(f"{self.origin}: {named(self.path + name)}: {problem}")

    def needed_integer(self, name: str, least: int, most: int) -> int:
        """A whole number from ``least`` to ``most``."""
        value = self.integer(name, least, most)
        if value is None:
            raise self.refuse(name, "is missing")
        return value

    def integer(self, name: str, least: int, most: int) -> int | None:
        """The same; None if the field is missing."""
        return self._integer(name, self.values.get(name), least, most)

    def integers(self, name: str, least: int, most: int) -> tuple[int, ...] | None:
        """One whole number, or a list of them; None if the field is missing."""
        value = self.values.get(name)
        given = value if isinstance(value, list) else [value]
        found = [self._integer(name, one, least, most) for one in given]
        if value is None:
            return None
        if None in found:
            raise self.refuse(name, "has a null among its numbers")
        return tuple(one for one in found if one is not None)

    def needed_number(self, name: str, above: float, most: float) -> float:
        """A number above ``above`` and at most ``most``."""
        value = self.number(name, above, most)
        if value is None:
            raise self.refuse(name, "is missing")
        return value

    def number(self, name: str, above: float, most: float, *, or_equal: bool = False) -> float | None:
        """The same, or equal to ``above`` with ``or_equal``; None if the field is missing."""
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(name, f"is {described(value)}; must be a number")
        is_in_range = above < value <= most or (or_equal and value == above)
        if not is_in_range or (isinstance(value, float) and not math.isfinite(value)):
            limit = f"{'at least' if or_equal else 'above'} {above:g}"
            raise self.refuse(name, f"is {described(value)}; {limit} and at most {most:g} is needed")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(name, f"is {described(value)}; must be true or false")
        return value

    def text(self, name: str) -> str | None:
        """A string; None if the field is missing."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise self.refuse(name, f"is {described(value)}; must be a string")
        return value

    def inner(self, name: str) -> FileFields:
        """The fields of an object; those of an empty one if it is missing."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.refuse(name, f"is {described(value)}; must be an object")
        return FileFields(self.origin, value or {}, f"{self.path}{name}.")

    def _integer(self, name: str, value: object, least: int, most: int) -> int | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(name, f"is {described(value)}; must be a whole number")
        if not least <= value <= most:
            raise self.refuse(name, f"is {described(value)}; from {least} to {most} is needed")
        return value
