import json
from pathlib import Path

import pytest

from muxmesh.cli.main import main
from tests.support.tiny import TinyShape, write_tiny_model


def test_what_would_be_loaded_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny_model(tmp_path / "model", TinyShape(architecture="Qwen3", dtype="bfloat16"))
    assert main(["model", "inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"] == "Qwen3ForCausalLM" and facts["qk_norm"] is True
    assert facts["weight_dtypes"] == ["BF16"] and facts["loaded_as"] == "float32"
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert main(["model", "inspect", str(folder)]) == 0
    assert "architecture        Qwen3ForCausalLM" in capsys.readouterr().out


def test_a_path_that_is_no_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "inspect", str(tmp_path / "none")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert main(["model", "inspect", str(tmp_path)]) == 1
    assert "has no config.json" in capsys.readouterr().err
