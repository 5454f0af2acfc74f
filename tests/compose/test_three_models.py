"""compose/three-models.yaml: three models on one unit, each with two services."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.compose.conftest import MakeStack
from tests.compose.stack import COMPOSE

pytestmark = pytest.mark.timeout(600)  # the first test also waits for engine and images
FILE = "mesh-three-models.yaml"


def test_three_models_serve_from_one_pool(stack: MakeStack, tmp_path: Path) -> None:
    mesh = yaml.safe_load((COMPOSE / FILE).read_text())
    (unit,) = mesh["units"]
    names = [model["name"] for model in unit["models"]]
    for model in unit["models"]:
        model.update(engine="sim", kv_guaranteed="16MiB")
        model.pop("source")
    (tmp_path / FILE).write_text(yaml.safe_dump(mesh))
    three = stack({"MESH_FILE_THREE_MODELS": str(tmp_path / FILE)}, "three-models.yaml")
    three.up()
    for name in names:
        result = three.muxmesh("generate", "--model", name, "--max-new-tokens", "9", "Hi")
        assert result.code == 0 and "9 output tokens" in result.output
    (status,) = three.status()["units"]
    assert sorted(model["model"] for model in status["models"]) == sorted(names)
    assert len(status["workers"]) == 2 * len(names) == 6
