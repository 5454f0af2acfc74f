"""Any content of the files of a model folder gives a model that works, or one line that names a file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.errors import InvalidRequest, ModelUnsupported
from muxmesh.models.model_check import check_model
from muxmesh.models.tokenizer import load_text_model
from tests.support.fuzzing import fuzz
from tests.support.mutations import JSON_VALUES, Mutation, byte_mutations, json_mutations
from tests.support.tiny import TinyShape, write_tiny_model

JSON_FILES = {
    "config.json": None,
    "tokenizer.json": None,
    "tokenizer_config.json": None,
    "generation_config.json": b'{"eos_token_id": [0, 1], "temperature": 0.6, "top_k": 20, "max_new_tokens": 9}',
    "special_tokens_map.json": b'{"eos_token": {"content": "<|eos|>", "lstrip": false}, "bos_token": "<|start|>"}',
    "added_tokens.json": b'{"<x>": 259, "<y>": 260}',
    "model.safetensors.index.json": b'{"weight_map": {"model.norm.weight": "model.safetensors"}}',
}
MAX_GROWTH_BYTES = 512 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("fuzz") / "m", TinyShape(num_layers=1))


def check(whole: Path, name: str, content: bytes) -> None:
    """Checks the model with ``content`` in one of its files, and uses it if it is accepted."""
    before = resident_bytes()
    folder = whole.with_name("changed")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in whole.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    problem = ""
    try:
        check_model(folder)
        use(folder)
    except ModelUnsupported as error:
        problem = str(error)
    assert problem.startswith(str(folder) if problem else "") and "\n" not in problem
    assert len(problem) < len(str(folder)) + 500
    assert resident_bytes() - before < MAX_GROWTH_BYTES


def use(folder: Path) -> None:
    """Encodes and decodes some texts; a tokenizer may be unable to encode them."""
    model = load_text_model(folder)
    for text in ("a b", "<|eos|>é\U0001f600", "  <x>"):
        with contextlib.suppress(InvalidRequest):
            assert isinstance(model.decode(model.encode(text, True), True), str)


def original(folder: Path, name: str) -> bytes:
    return JSON_FILES.get(name) or (folder / name).read_bytes()


@fuzz(quick=60, part=0.06)
@given(name=st.sampled_from(sorted(JSON_FILES)), mutation=json_mutations())
def test_any_change_of_a_json_file(folder: Path, name: str, mutation: Mutation) -> None:
    check(folder, name, mutation(original(folder, name)))


@fuzz(quick=30, part=0.03)
@given(name=st.sampled_from([*sorted(JSON_FILES), "model.safetensors"]), mutation=byte_mutations())
def test_any_change_of_the_bytes_of_a_file(folder: Path, name: str, mutation: Mutation) -> None:
    check(folder, name, mutation(original(folder, name)))


@fuzz(quick=30, part=0.03)
@given(mutation=byte_mutations(most=1200))
def test_any_change_of_the_header_of_the_weights(folder: Path, mutation: Mutation) -> None:
    check(folder, "model.safetensors", mutation(original(folder, "model.safetensors")))


@fuzz(quick=30, part=0.03)
@given(name=st.sampled_from([*sorted(JSON_FILES), "chat_template.jinja"]), content=st.binary(max_size=60))
def test_any_short_content(folder: Path, name: str, content: bytes) -> None:
    check(folder, name, content)


@fuzz(quick=20, part=0.0)
@given(value=JSON_VALUES)
def test_any_chat_template_in_the_config(folder: Path, value: object) -> None:
    check(folder, "tokenizer_config.json", json.dumps({"chat_template": value}).encode())
