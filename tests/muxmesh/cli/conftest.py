from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_mesh import FakeMesh, fake_mesh_in_thread


@pytest.fixture
def mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMesh]:
    """A fake mesh at the address that commands use by default."""
    with fake_mesh_in_thread(tmp_path) as fake:
        monkeypatch.setenv("MUXMESH_ADDRESS", fake.address)
        yield fake
