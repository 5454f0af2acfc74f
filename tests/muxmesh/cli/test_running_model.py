"""How the commands for a running mesh find it, and what they show. With a mesh: tests/mesh/test_living_unit.py."""

from pathlib import Path

import pytest

from muxmesh.cli.command_parser import command_parser
from muxmesh.cli.main import main
from muxmesh.cli.running_model import model_of, rows
from muxmesh.v1 import mesh_pb2


def test_a_mesh_that_does_not_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "ps", "--state-dir", str(tmp_path)]) == 1
    assert f"no mesh runs with the state directory {tmp_path}" in capsys.readouterr().err
    assert main(["model", "ps", "--runtime", str(tmp_path / "none.json")]) == 1
    assert "the runtime file cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["max_num_seqs", "=4", "x={"])
def test_a_setting_is_a_field_and_a_value_of_yaml(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "load", "m", "--set", text]) == 2
    assert "argument --set: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("models/Qwen2.5-0.5B-Instruct/", "Qwen2.5-0.5B-Instruct"),
        ("models/tiny-v1.5.gguf", "tiny-v1.5"),
    ],
)
def test_a_loaded_model_has_the_name_of_its_source(source: str, name: str) -> None:
    arguments = command_parser().parse_args(["model", "load", source])
    assert model_of(arguments)["name"] == name
    assert model_of(command_parser().parse_args(["model", "load", source, "--name", "other"]))["name"] == "other"


@pytest.mark.parametrize(
    ("engines", "weights"),
    [
        (["awake", "asleep"], "mapped"),
        (["asleep", "asleep"], "kept"),
        (["asleep", "dropped"], "kept"),
        (["dropped", "dropped"], "dropped"),
        (["", "dropped"], "changing"),
    ],
)
def test_a_row_adds_up_what_the_workers_of_a_model_have(engines: list[str], weights: str) -> None:
    unit = mesh_pb2.UnitStatus(
        unit="u",
        models=[
            mesh_pb2.UnitModelStatus(
                model="m", state="asleep", num_leased_token_blocks=2, num_cached_token_blocks=3, token_block_bytes=10
            )
        ],
        workers=[mesh_pb2.WorkerStatus(model="m", engine=engine, own_memory_bytes=7) for engine in engines]
        + [mesh_pb2.WorkerStatus(model="other", engine="awake", own_memory_bytes=100)],
    )
    (row,) = rows(mesh_pb2.GetStatusResponse(units=[unit]))
    assert (row["weights"], row["kv_bytes"], row["workers_bytes"]) == (weights, 50, 14)
