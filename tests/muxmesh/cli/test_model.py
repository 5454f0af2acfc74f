import json
from pathlib import Path
from typing import Any

import pytest

from muxmesh.cli.main import main
from muxmesh.models.catalog import CATALOG
from muxmesh.models.model_download import model_folder
from muxmesh.models.weight_image import read_layout
from tests.support.gguf_files import TOKENS, TinyGguf, write_gguf
from tests.support.tiny import TinyShape, write_tiny_model

NAME = "smollm2-135m-instruct"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MUXMESH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def inspected(path: Path | str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["model", "inspect", str(path), "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_the_catalog_is_listed_with_what_is_downloaded(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for present, state in ((False, "93 MB"), (True, "downloaded")):
        assert main(["model", "list", "--json"]) == 0
        (model,) = json.loads(capsys.readouterr().out)
        assert (model["name"], model["present"]) == (NAME, present)
        assert model.keys() == {"name", "description", "license", "download_bytes", "present"}
        assert main(["model", "list"]) == 0
        assert capsys.readouterr().out.startswith(f"{NAME}  [{state}]  SmolLM2 135M")
        model_folder(CATALOG[NAME], cache).mkdir(parents=True, exist_ok=True)


def test_pulling_an_unknown_model_lists_the_catalog(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "pull", "gpt"]) == 1
    error = capsys.readouterr().err
    assert "'gpt'" in error and NAME in error


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", "https://hub.example/org/model", "hf:org/model:q4"])
def test_a_name_of_a_hub_is_refused_with_what_to_do_instead(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "pull", name]) == 1
    assert capsys.readouterr().err == (
        f"muxmesh: no model '{name}' in the catalog; available: {NAME}. Models come from the catalog or from this "
        "machine, not from a hub: fetch the files, and name their folder or GGUF file as `source`\n"
    )


def test_a_model_on_this_machine_needs_no_pull(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "pull", str(tmp_path)]) == 1
    assert "is on this machine, so there is nothing to download: name it as `source`" in capsys.readouterr().err


def test_pulling_a_model_that_is_present_prepares_its_weights_once(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny_model(model_folder(CATALOG[NAME], cache), TinyShape())
    assert main(["model", "pull", NAME, "--json"]) == 0
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert content == {"name": NAME, "folder": str(folder), "image": content["image"]}
    assert Path(content["image"]).is_file() and f"{NAME}: preparing" in printed.err
    assert main(["model", "pull", NAME]) == 0
    assert capsys.readouterr() == (f"{NAME} is in {folder}\n", "")


def test_pulling_with_a_dtype_prepares_the_weights_for_a_gpu(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_model(model_folder(CATALOG[NAME], cache), TinyShape())
    assert main(["model", "pull", NAME, "--dtype", "bfloat16", "--json"]) == 0
    image = Path(json.loads(capsys.readouterr().out)["image"])
    assert image.suffix == ".bf16" and read_layout(image).dtype == "bfloat16"


def test_sizes_follow_the_dtype_of_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write_tiny_model(tmp_path / "model", TinyShape()))
    facts = {}
    for arguments in ([], ["--dtype", "float16"]):
        assert main(["model", "inspect", folder, *arguments, "--json"]) == 0
        facts[len(arguments)] = json.loads(capsys.readouterr().out)
    assert facts[2]["loaded_as"] == "float16"
    assert [2 * facts[2][size] for size in ("image_bytes", "kv_bytes_per_token")] == [
        facts[0][size] for size in ("image_bytes", "kv_bytes_per_token")
    ]


def test_a_folder_is_shown_as_an_engine_would_load_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny_model(tmp_path / "model", TinyShape(architecture="Qwen3", dtype="bfloat16"))
    facts = inspected(folder, capsys)
    assert facts["folder"] == str(folder)
    assert facts["architecture"] == "Qwen3ForCausalLM" and facts["qk_norm"] is True
    assert facts["weight_dtypes"] == ["BF16"] and facts["loaded_as"] == "float32"
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert facts["image_bytes"] == 4 * facts["parameters"]
    assert (facts["layers"], facts["heads"], facts["kv_heads"], facts["head_dim"]) == (2, 4, 2, 16)
    assert facts["chat_template"] is True and facts["rope_scaling"] is None


def test_facts_for_people_are_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rope = {"rope_type": "linear", "factor": 4.0}
    folder = write_tiny_model(tmp_path / "model", TinyShape(rope=rope, max_position_embeddings=4096))
    assert main(["model", "inspect", str(folder)]) == 0
    table = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    shown = {name: value.strip() for name, value in table.items()}
    assert shown["architecture"] == "LlamaForCausalLM"
    assert shown["context len"] == "4,096", "large numbers have separators"
    assert shown["tied embeddings"] == "yes" and shown["qkv bias"] == "no"
    assert shown["eos token ids"] == "0"
    assert shown["rope scaling"].endswith("factor 4.0")
    assert shown["weight files"] == "model.safetensors"


def test_a_gguf_file_is_shown_as_an_engine_would_load_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, TinyGguf(heads=4, kv_heads=2))
    facts = inspected(path, capsys)
    assert facts["file"] == str(path) and facts["weight_files"] == ["tiny.gguf"]
    assert (facts["vocab_size"], facts["context_len"], facts["kv_heads"]) == (len(TOKENS), 128, 2)
    assert facts["chat_template"] is True and 2 in facts["eos_token_ids"]


def test_folder_and_gguf_file_have_the_same_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    folder = inspected(write_tiny_model(tmp_path / "model", TinyShape()), capsys)
    file = inspected(tmp_path / "tiny.gguf", capsys)
    assert folder.keys() - {"folder"} == file.keys() - {"file"}


def test_a_name_of_the_catalog_stands_for_its_folder(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny_model(model_folder(CATALOG[NAME], cache), TinyShape())
    assert inspected(NAME, capsys)["folder"] == str(folder)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("none", f"'none' is neither a folder, nor a .gguf file, nor in the catalog ({NAME})\n"),
        ("org/name", f"nor in the catalog ({NAME}). Models come from the catalog or from this machine, not from a hub"),
        (NAME, f"{NAME} is in the catalog and not downloaded yet; `muxmesh model pull {NAME}` downloads it"),
        ("file.bin", "is neither a folder nor a .gguf file"),
        ("folder", "config.json"),
        ("broken.gguf", "broken.gguf"),
    ],
)
def test_a_path_that_is_not_a_model_is_refused(
    cache: Path,
    tmp_path: Path,
    path: str,
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.bin").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    assert main(["model", "inspect", path]) == 1
    assert problem in capsys.readouterr().err


def test_an_unsupported_model_is_named_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny_model(tmp_path / "model", TinyShape())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    assert main(["model", "inspect", str(folder), "--json"]) == 1
    error = json.loads(capsys.readouterr().out)
    assert error["error"] == "ModelUnsupported" and "MambaForCausalLM" in error["message"]
