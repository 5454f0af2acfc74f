"""The base of all parts of the configuration, and the kinds of values that several of them have.

Knows no part of the configuration.
"""

from __future__ import annotations

import re
from typing import Annotated, get_args

from pydantic import BaseModel, ByteSize, ConfigDict, StringConstraints, ValidationInfo, field_validator

from muxmesh.quoting import quoted

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=64)]

MIB = 1024 * 1024
MAX_COUNT = 2**31 - 1
"""Upper bound of every number of tokens, threads or requests."""
MAX_BYTES = 2**60
"""Upper bound of every size."""
_SIZE = re.compile(r"\d+(\.\d+)?\s*([kmgtp]i?)?b?", re.IGNORECASE)
SIZE_NEEDED = "must be bytes, or a number and one of KiB, MiB, GiB, TiB, KB, MB, GB, TB"
HOST_NEEDED = "must be a DNS name or an address, without a port"
NETWORK_NEEDED = "must be an address or a network like 10.1.0.0/16"

Location = tuple[str | int, ...]
"""Path of a field: names and list indices."""


class Section(BaseModel):
    """Base of all parts of the configuration. Unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_what_pydantic_misreads(cls, value: object, field: ValidationInfo) -> object:
        """YAML's `yes` and `on` are True, which would become 1; of a size only the beginning would be read."""
        kind = cls.model_fields[field.field_name or ""].annotation
        if isinstance(value, bool) and any(one in (int, float, ByteSize) for one in (kind, *get_args(kind))):
            raise ValueError(f"is {str(value).lower()}; must be a number")
        if kind is ByteSize and isinstance(value, str) and not _SIZE.fullmatch(value.strip()):
            raise ValueError(f"is {quoted(value)}; {SIZE_NEEDED}")
        return value
