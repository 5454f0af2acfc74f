"""Finds the chat template of a model folder, as transformers does. Compiles and renders nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from muxmesh.models.file_fields import FileFields
from muxmesh.models.model_files import described, read_json_object, read_text

_DEFAULT = "default"


def find_chat_template(folder: Path, config: FileFields) -> tuple[str | None, str | None]:
    """Returns the template for conversations, and why there is none although the model has templates.

    ``config`` has the fields of `tokenizer_config.json`. Templates in files of their own have precedence over those in
    it. Of several templates `default` is used. Raises ModelUnsupported for a file that cannot be read.
    """
    of_files = _templates_of_files(folder)
    found: Any = of_files or config.values.get("chat_template")
    origin = "chat_template"
    if found is None:
        path = folder / "chat_template.json"
        found = (read_json_object(path) or {}).get("chat_template")
        origin = path.name
    if isinstance(found, list):
        found = _by_name(found)
    if isinstance(found, dict):
        if _DEFAULT not in found:
            names = ", ".join(sorted(map(str, found)))[:100]
            return None, f"the model has several chat templates and none is called {_DEFAULT}: {names}"
        found = found[_DEFAULT]
    if found is not None and not isinstance(found, str):
        return None, f"the model's {origin} is {described(found)}; must be a string, or several with names"
    return found, None


def _templates_of_files(folder: Path) -> dict[str, str]:
    files = {_DEFAULT: folder / "chat_template.jinja"}
    files |= {path.name.removesuffix(".jinja"): path for path in _sorted(folder / "additional_chat_templates")}
    texts = {name: read_text(path) for name, path in files.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _sorted(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jinja")) if os.path.isdir(folder) else []


def _by_name(entries: list[Any]) -> Any:
    """The templates of a list of objects with `name` and `template`; the list itself if an entry is no such object."""
    if not all(isinstance(one, dict) and isinstance(one.get("name"), str) and "template" in one for one in entries):
        return entries
    return {one["name"]: one["template"] for one in entries}
