"""Paths that a person gives, of which none is refused here."""

from pathlib import Path

import pytest

from muxmesh.local_path import local_path


@pytest.mark.parametrize(
    ("given", "path"),
    [("model", "base/model"), ("../model", "model"), ("~/model", "home/model"), ("a\0b", "base/a\ufffdb")],
)
def test_a_path_starts_from_the_base_or_the_home_directory(
    given: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert local_path(given, tmp_path / "base") == tmp_path / path
    assert local_path(str(tmp_path / "x"), tmp_path / "base") == tmp_path / "x"
