"""One engine and one set of images for all tests of compose/."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from muxmesh.clock import SystemClock
from tests.compose.docker_engine import DockerEngine, kept_engine, running_engine
from tests.compose.engine_parts import problem
from tests.compose.package_index import index_secrets
from tests.compose.stack import Stack

SIM_MESH = """
listen: 0.0.0.0:50051
units:
  - name: cpu0
    kv_pool: ${KV_POOL}
    models:
      - {name: sim, engine: sim, sim: {base_s: 0.02}, max_num_seqs: 32}
"""
WRONG_PORT = "50065"
MakeStack = Callable[..., Stack]


@pytest.fixture(scope="session")
def engine() -> Iterator[DockerEngine]:
    """A Docker engine: the one of MUXMESH_TEST_ENGINE, or one for this session."""
    if folder := os.environ.get("MUXMESH_TEST_ENGINE"):
        yield kept_engine(Path(folder))
        return
    if (why := problem()) is not None:
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="muxmesh-engine-") as own, running_engine(Path(own)) as running:
        yield running


@pytest.fixture(scope="session")
def index_values(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The variables of .env for the package index of this machine."""
    return index_secrets(tmp_path_factory.mktemp("index"))


@pytest.fixture(scope="session")
def images(engine: DockerEngine, index_values: Mapping[str, str]) -> str:
    """Builds the images of this checkout; returns their tag."""
    clock = SystemClock()
    begun_at_s = clock.monotonic_s()
    result = Stack(engine, "muxmesh-build", {"PORT": "50051", **index_values}).compose("build")
    assert result.code == 0, result.output
    sizes = engine.docker("images", "--filter", "reference=muxmesh-*", "--format", "{{.Repository}} {{.Size}}")
    print(f"\nimages built in {clock.monotonic_s() - begun_at_s:.0f} s: {', '.join(sizes.splitlines())}")
    return "dev"


@pytest.fixture(scope="session")
def sim_values(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The variables of .env for a mesh of one sim model."""
    file = tmp_path_factory.mktemp("mesh") / "mesh.yaml"
    file.write_text(SIM_MESH)
    return {"MODEL": "sim", "MESH_FILE": str(file), "KV_POOL": "64MiB"}


@pytest.fixture
def stack(engine: DockerEngine, images: str, sim_values: Mapping[str, str]) -> Iterator[MakeStack]:
    """Makes the stack of one test, which ends with it: ``stack(values, *files)``."""
    made: list[Stack] = []

    def make(values: Mapping[str, str] | None = None, *files: str) -> Stack:
        settings = {**sim_values, "PORT": WRONG_PORT, **(values or {})}
        made.append(Stack(engine, "muxmesh-wrong", settings, ("compose.yaml", *files)))
        return made[-1]

    yield make
    for one in made:
        one.down()
