from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from muxmesh.errors import ModelUnsupported
from muxmesh.models.chat_template_files import find_chat_template
from muxmesh.models.file_fields import FileFields
from muxmesh.models.tokenizer import byte_tokenizer


def found(folder: Path, config: Any, files: dict[str, str]) -> tuple[str | None, str | None]:
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    (folder / "additional_chat_templates").mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return find_chat_template(folder, FileFields(folder / "tokenizer_config.json", config))


DEFAULT_AND_TOOLS = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
MORE = "additional_chat_templates"
FOLDERS: dict[str, tuple[Any, dict[str, str]]] = {
    "in the config": ({"chat_template": "c"}, {}),
    "a list in the config": ({"chat_template": DEFAULT_AND_TOOLS}, {}),
    "a dictionary in the config": ({"chat_template": {"default": "d", "tool_use": "t"}}, {}),
    "a file": ({}, {"chat_template.jinja": "f é"}),
    "a file before the config": ({"chat_template": "c"}, {"chat_template.jinja": "f"}),
    "a file before a list": ({"chat_template": DEFAULT_AND_TOOLS}, {"chat_template.jinja": "f"}),
    "a file and more": ({}, {"chat_template.jinja": "f", f"{MORE}/tool_use.jinja": "t"}),
    "a default among more": ({"chat_template": "c"}, {f"{MORE}/default.jinja": "m", f"{MORE}/tool_use.jinja": "t"}),
    "a default among more before the file": ({}, {"chat_template.jinja": "f", f"{MORE}/default.jinja": "m"}),
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_template_is_the_one_that_transformers_uses(tmp_path: Path, folder: str) -> None:
    template, problem = found(tmp_path, *FOLDERS[folder])
    assert problem is None
    assert template == AutoTokenizer.from_pretrained(tmp_path).get_chat_template()


UNUSABLE: dict[str, tuple[Any, dict[str, str], str]] = {
    "no default": ({"chat_template": [{"name": "a", "template": "t"}]}, {}, "none is called default: a"),
    "only others": ({"chat_template": "c"}, {f"{MORE}/a.jinja": "t"}, "none is called default: a"),
    "a number": ({"chat_template": 3}, {}, "the model's chat_template is 3; must be a string"),
    "a list of numbers": ({"chat_template": [3]}, {}, "the model's chat_template is a list; must be a string"),
    "no name": ({"chat_template": [{"template": "a"}]}, {}, "the model's chat_template is a list; must be a string"),
    "a default that is a list": ({"chat_template": {"default": []}}, {}, "is a list; must be a string"),
}


@pytest.mark.parametrize("folder", UNUSABLE)
def test_templates_without_a_usable_one_are_a_problem(tmp_path: Path, folder: str) -> None:
    config, files, expected = UNUSABLE[folder]
    template, problem = found(tmp_path, config, files)
    assert template is None and problem is not None and expected in problem


@pytest.mark.parametrize("config", [{}, {"chat_template": None}])
def test_a_folder_without_a_template_has_none(tmp_path: Path, config: Any) -> None:
    assert found(tmp_path, config, {}) == (None, None)


def test_the_template_of_a_processor_is_used_if_there_is_no_other(tmp_path: Path) -> None:
    assert found(tmp_path, {}, {"chat_template.json": '{"chat_template": "p"}'}) == ("p", None)
    assert find_chat_template(tmp_path, FileFields(Path("f"), {"chat_template": "c"})) == ("c", None)


def test_a_template_that_is_no_text_is_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"a\n\xff")
    with pytest.raises(ModelUnsupported, match=r"chat_template\.jinja:2: is not UTF-8"):
        find_chat_template(tmp_path, FileFields(Path("f"), {}))
