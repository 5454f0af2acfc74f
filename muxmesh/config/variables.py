"""Variables of the environment in the values of mesh.yaml: ``${NAME}`` and ``${NAME:-default}``; ``$${`` is ``${``."""

from __future__ import annotations

import re
from collections.abc import Mapping

_REFERENCE = re.compile(r"\$\$\{|\$\{([^}]*)\}?")
_CONTENT = re.compile(r"([A-Za-z_]\w*)(?::-(.*))?", re.ASCII | re.DOTALL)


def with_variables(text: str, variables: Mapping[str, str]) -> str:
    """``text`` with the value of each variable that it names. A default also stands for an empty value.

    Raises ValueError, which says what is wrong: a variable without a default is not set, or ``${`` is used otherwise.
    """

    def value(reference: re.Match[str]) -> str:
        if reference[0] == "$${":
            return "${"
        content = _CONTENT.fullmatch(reference[1]) if reference[0].endswith("}") else None
        if content is None:
            raise ValueError("has `${` without ${NAME} or ${NAME:-default}; write `$${` for the characters")
        name, default = content.groups()
        if found := variables.get(name):
            return found
        if default is None:
            raise ValueError(f"names the variable {name}, which is not set")
        return str(default)

    return _REFERENCE.sub(value, text)
