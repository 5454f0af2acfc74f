"""Damaged model files in `muxmesh model inspect` and `muxmesh up`: one line, the same, before anything starts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muxmesh.cli.main import main
from tests.support.gguf_files import write_gguf
from tests.support.tiny import TinyShape, write_tiny_model

Damage = Callable[[Path], object]
CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 5\n"


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def data(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def config(**changes: Any) -> Damage:
    def change(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def replaced(name: str, make: Damage) -> Damage:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def cut(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


FOLDERS: dict[str, tuple[Damage, str]] = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), "has no config.json"),
    "an empty config": (text(CONFIG, ""), "config.json: is empty; a JSON object is needed"),
    "a config that is a list": (text(CONFIG, "[]"), "config.json: is a list, not a JSON object"),
    "a config that is cut off": (text(CONFIG, '{\n"a": '), "config.json:2: not JSON"),
    "a config with a byte order mark": (text(CONFIG, "\ufeff{}"), "config.json:1: begins with a byte order mark"),
    "a config in Latin-1": (data(CONFIG, b'{"a": "\xe9"}'), "config.json:1: is not UTF-8"),
    "a deeply nested config": (text(CONFIG, '{"a":' * 99_999), "config.json: not JSON: is nested too deeply"),
    "a pointer as config": (text(CONFIG, LFS), "config.json: is a git-lfs pointer, not the file itself"),
    "a directory as config": (replaced(CONFIG, Path.mkdir), "config.json: is a directory, not a file"),
    "a FIFO as config": (replaced(CONFIG, os.mkfifo), "config.json: is not a regular file"),
    "a broken link as config": (replaced(CONFIG, lambda p: p.symlink_to("x")), "config.json: is a broken symbolic"),
    "no heads": (config(num_attention_heads=0), "config.json: num_attention_heads: is 0; from 1 to 4096 is needed"),
    "negative layers": (config(num_hidden_layers=-1), "config.json: num_hidden_layers: is -1; from 1 to"),
    "a fractional size": (config(hidden_size=48.0), "config.json: hidden_size: is 48.0; must be a whole number"),
    "a size that is true": (config(intermediate_size=True), "intermediate_size: is true; must be a whole number"),
    "a theta that is NaN": (config(rope_parameters={"rope_theta": float("nan")}), "rope_parameters.rope_theta: is nan"),
    "a huge context": (config(max_position_embeddings=10**30), "max_position_embeddings: is 1000000000000000000000"),
    "an eos below 0": (config(eos_token_id=-1), "config.json: eos_token_id: is -1; from 0 to 258 is needed"),
    "an eos of the generation config": (
        text("generation_config.json", '{"eos_token_id": [0, 259]}'), "generation_config.json: eos_token_id: is 259",
    ),
    "a generation config that is a list": (text("generation_config.json", "[1]"), "generation_config.json: is a list"),
    "a bad temperature": (
        text("generation_config.json", '{"temperature": 1e400}'), "generation_config.json: temperature: is inf; at",
    ),
    "another vocabulary": (config(vocab_size=300), "weight model.embed_tokens.weight has shape (259, 48)"),
    "more layers": (config(num_hidden_layers=3), "weight model.layers.2.input_layernorm.weight is missing"),
    "fewer layers": (config(num_hidden_layers=1), "weights are not part of a supported model: model.layers.1."),
    "no tokenizer": (lambda folder: (folder / TOKENIZER).unlink(), "has no tokenizer.json"),
    "an empty tokenizer": (text(TOKENIZER, ""), "tokenizer.json: is empty; a JSON object is needed"),
    "a pointer as tokenizer": (text(TOKENIZER, LFS), "tokenizer.json: is a git-lfs pointer"),
    "another object as tokenizer": (text(TOKENIZER, '{"a": 1}'), "tokenizer.json: is no tokenizer that `tokenizers`"),
    "a list as tokenizer config": (text("tokenizer_config.json", "[]"), "tokenizer_config.json: is a list, not a JSON"),
    "a token that is a number": (text("tokenizer_config.json", '{"eos_token": 3}'), "config.json: eos_token: is 3"),
    "a map of special tokens": (text("special_tokens_map.json", "3"), "special_tokens_map.json: is 3, not a JSON"),
    "added tokens": (text("added_tokens.json", '{"a": -1}'), "added_tokens.json: a: is -1; from 0 to 4294967295"),
    "a template that is no UTF-8": (data("chat_template.jinja", b"\xff"), "chat_template.jinja:1: is not UTF-8"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "weights are missing: model.safetensors"),
    "empty weights": (data(WEIGHTS, b""), "model.safetensors: not a safetensors file, or damaged: has 0 bytes"),
    "a pointer as weights": (text(WEIGHTS, LFS), "model.safetensors: is a git-lfs pointer"),
    "truncated weights": (cut(WEIGHTS, lambda whole: whole[:-100]), "model.safetensors: not a safetensors file"),
    "a header of 2^63 bytes": (cut(WEIGHTS, lambda whole: b"\0" * 7 + b"\x80" + whole[8:]), "its header claims 922337"),
    "an index to elsewhere": (
        text("model.safetensors.index.json", '{"weight_map": {"a": "../../x"}}'), "weight_map.a: is '../../x'; must be",
    ),
    "an index that is a pointer": (text("model.safetensors.index.json", LFS), "index.json: is a git-lfs pointer"),
}  # fmt: skip
GGUF: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda whole: b"", "m.gguf: not a GGUF file, or damaged: is empty"),
    "a pointer": (lambda whole: LFS.encode(), "m.gguf: is a git-lfs pointer"),
    "truncated header": (lambda whole: whole[:500], "the file is truncated"),
    "truncated weights": (lambda whole: whole[:-1000], "it is truncated"),
    "a lying number of fields": (lambda whole: whole[:16] + b"\xff" * 8 + whole[24:], "fields; at most 65536 each"),
    "a lying length": (
        lambda whole: whole[:24] + b"\xff" * 8 + whole[32:],
        "the name of field 0: needs 18446744073",
    ),
    "another architecture": (lambda whole: whole.replace(b"llama", b"lxama"), "architecture lxama is not supported"),
    "no eps": (lambda whole: whole.replace(b"rms_epsilon", b"rms_epsilom"), "layer_norm_rms_epsilon: is missing"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a sound folder and a sound GGUF file. Tests only read it."""
    base = tmp_path_factory.mktemp("whole")
    write_tiny_model(base / "m", TinyShape())
    write_gguf(base / "m.gguf")
    return base


def shown_by_both(path: Path, state: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `model inspect` prints about a damaged model. `up` must print the same and start nothing."""
    assert main(["model", "inspect", str(path)]) == 1
    inspected = capsys.readouterr()
    assert inspected.out == "" and inspected.err.count("\n") == 1
    problem = inspected.err.strip().removeprefix("muxmesh: ")
    mesh = state / "mesh.yaml"
    mesh.write_text(f"units: [{{kv_pool: 64MiB, models: [{{name: m, source: {path}}}]}}]\n")
    assert main(["up", "-c", str(mesh), "--state-dir", str(state / "state")]) == 1
    up = capsys.readouterr()
    assert up.out == "" and problem in up.err and "Traceback" not in up.err
    assert not list((state / "state").glob("run-*"))
    return problem


@pytest.mark.parametrize("damage", FOLDERS)
def test_a_damaged_folder_is_one_line_in_both_commands(
    whole: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, problem = FOLDERS[damage]
    folder = shutil.copytree(whole / "m", tmp_path / "m")
    change(folder)
    assert problem in shown_by_both(folder, tmp_path, capsys)


@pytest.mark.parametrize("damage", GGUF)
def test_a_damaged_gguf_file_is_one_line_in_both_commands(
    whole: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, problem = GGUF[damage]
    path = tmp_path / "m.gguf"
    path.write_bytes(change((whole / "m.gguf").read_bytes()))
    assert problem in shown_by_both(path, tmp_path, capsys)


def test_a_template_that_cannot_be_compiled_is_reported_and_is_no_error(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(whole / "m", tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}")
    assert main(["model", "inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["chat_template"] is False
    assert "cannot be compiled: line 1: Unexpected end of template" in facts["chat_template_problem"]


@pytest.mark.parametrize(
    "path", ["a" * 5000, "~nobody/m", "a\nb", "a\0b.gguf", "\udcff", "loop", "loop/m.gguf", "", "fifo.gguf"]
)
def test_a_path_that_is_no_model_is_one_line_in_both_commands(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo.gguf")
    assert main(["model", "inspect", path]) == 1
    inspected = capsys.readouterr().err
    assert inspected.startswith("muxmesh: ") and inspected.count("\n") == 1
    mesh = {"units": [{"kv_pool": "64MiB", "models": [{"name": "m", "source": path}]}]}
    (tmp_path / "mesh.yaml").write_text(json.dumps(mesh))
    assert main(["up", "-c", "mesh.yaml", "--state-dir", str(tmp_path / "state")]) == 1
    assert "Traceback" not in capsys.readouterr().err
