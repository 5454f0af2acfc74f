from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from muxmesh.errors import ModelUnsupported
from muxmesh.models.tokenizer import byte_tokenizer, load_text_model

SPACE = "▁"
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TOKENS = [*SPECIAL, *BYTES, SPACE, "a", "b", "c", "x", SPACE + "a", "ab", SPACE + "ab", SPACE * 2, "é"]
MERGES = [(SPACE, "a"), ("a", "b"), (SPACE + "a", "b"), (SPACE, "ab"), (SPACE, SPACE)]
TEXTS = ["ab c", " ab", "  ab", "</s>ab", "x</s> ab", "<s>\nab</s>  x", "日é", "ab "]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"add_prefix_space": False},
    {"add_prefix_space": True, "legacy": True},
    {"legacy": False, "add_bos_token": False, "add_eos_token": True},
]


def with_prefix(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)


def without_prefix(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])


def metaspace(tokenizer: Tokenizer) -> None:
    with_prefix(tokenizer)
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)


FILES = {"with a prefix": with_prefix, "without a prefix": without_prefix, "metaspace": metaspace}


def sentencepiece(file: str) -> Tokenizer:
    """A tokenizer in the style of Llama 2, with a first token."""
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    FILES[file](tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, model_type: str = "llama", **config: Any) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def assert_same(folder: Path) -> None:
    ours, theirs = load_text_model(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text, True) == ids, text
        assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True), text


@pytest.mark.parametrize(("file", "settings"), list(itertools.product(FILES, SETTINGS)))
def test_the_llama_class_splits_as_in_transformers_whatever_the_file_says(
    tmp_path: Path, file: str, settings: dict[str, Any]
) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert_same(write(tmp_path, sentencepiece(file), tokenizer_class="LlamaTokenizer", **tokens, **settings))


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "PreTrainedTokenizerFast", None])
def test_the_class_is_found_by_its_names(tmp_path: Path, name: str | None) -> None:
    assert_same(write(tmp_path, sentencepiece("with a prefix"), **({"tokenizer_class": name} if name else {})))


def test_mistral_keeps_its_file(tmp_path: Path) -> None:
    assert_same(write(tmp_path, sentencepiece("with a prefix"), "mistral", tokenizer_class="LlamaTokenizer"))


def test_a_byte_level_file_of_that_class_is_kept(tmp_path: Path) -> None:
    assert_same(write(tmp_path, byte_tokenizer(), tokenizer_class="LlamaTokenizer"))


def test_a_class_that_is_no_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match=r"tokenizer_config.json: tokenizer_class: is 3; must be a string"):
        load_text_model(write(tmp_path, byte_tokenizer(), tokenizer_class=3))
