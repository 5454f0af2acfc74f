"""Any content of a GGUF file gives a model that works, or one line that names the file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given

from muxmesh.errors import ModelUnsupported
from muxmesh.models.gguf_import import import_gguf
from muxmesh.models.model_check import check_model
from tests.fuzz.test_model_folders import MAX_GROWTH_BYTES, resident_bytes, use
from tests.support.fuzzing import fuzz
from tests.support.gguf_files import TinyGguf, write_gguf
from tests.support.mutations import Mutation, byte_mutations


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "whole.gguf"
    write_gguf(path, TinyGguf())
    return path


def check(whole: Path, content: bytes) -> None:
    """Checks the file; one that is accepted is imported, and the folder has to be sound too."""
    before = resident_bytes()
    path, folder = whole.with_name("m.gguf"), whole.with_name("m")
    shutil.rmtree(folder, ignore_errors=True)
    path.write_bytes(content)
    problem = ""
    try:
        facts = check_model(path)
        import_gguf(path, folder, lambda done, total: None)
        assert check_model(folder).spec == facts.spec
        use(folder)
    except ModelUnsupported as error:
        problem = str(error)
    assert "\n" not in problem and len(problem) < len(str(path)) + 500
    assert not problem or "m.gguf: " in problem
    assert resident_bytes() - before < MAX_GROWTH_BYTES


@fuzz(quick=30, part=0.05)
@given(mutation=byte_mutations())
def test_any_change_of_the_bytes(whole: Path, mutation: Mutation) -> None:
    check(whole, mutation(whole.read_bytes()))


@fuzz(quick=60, part=0.05)
@given(mutation=byte_mutations(most=900))
def test_any_change_of_the_first_fields(whole: Path, mutation: Mutation) -> None:
    check(whole, mutation(whole.read_bytes()))


@fuzz(quick=60, part=0.05)
@given(mutation=byte_mutations(most=1500))
def test_any_change_of_the_tensors_infos(whole: Path, mutation: Mutation) -> None:
    content = whole.read_bytes()
    start = content.index(b"token_embd.weight") - 100
    check(whole, content[:start] + mutation(content[start:]))
