from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from muxmesh.errors import ModelUnsupported
from muxmesh.models.file_fields import FileFields
from muxmesh.models.special_tokens import read_special_tokens
from muxmesh.models.tokenizer import byte_tokenizer, load_text_model, load_tokenizer

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TOKEN = {
    "content": "<x>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True,
}  # fmt: skip
TEXTS = ["a <x> b<|eos|>c", "<x><y> <z>  <pad>", "<s>hello</s>", "  <x>  ", "plain", "<y>\n<|start|>"]


def token(**changes: Any) -> dict[str, Any]:
    return {**TOKEN, **changes}


FOLDERS: dict[str, dict[str, Any]] = {
    "none": {},
    "named, as texts": {CONFIG: {"bos_token": "<|start|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}},
    "named, not in the vocabulary": {CONFIG: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<x>"}},
    "null": {CONFIG: {"bos_token": None, "eos_token": "<|eos|>"}},
    "as objects": {CONFIG: {"bos_token": {"__type": "AddedToken", **token()}}},
    "all seven": {CONFIG: {f"{one}_token": f"<{one}>" for one in ["bos", "eos", "unk", "sep", "pad", "cls", "mask"]}},
    "of a name of its own": {CONFIG: {"image_token": "<x>", "eos_token": "<|eos|>"}},
    "additional": {CONFIG: {"additional_special_tokens": ["<x>", "<y>"]}},
    "extra": {CONFIG: {"extra_special_tokens": ["<x>", {"__type": "AddedToken", **token(content="<y>")}]}},
    "extra, with names": {CONFIG: {"extra_special_tokens": {"image_token": "<x>", "other_token": "<y>"}}},
    "map": {MAP: {"bos_token": "<|start|>", "eos_token": token(content="<|eos|>")}},
    "map before config": {CONFIG: {"eos_token": "<|eos|>"}, MAP: {"eos_token": "<|pad|>", "bos_token": "<x>"}},
    "map of additional tokens": {MAP: {"additional_special_tokens": ["<x>", "<y>"]}},
    "decoder": {CONFIG: {"added_tokens_decoder": {"259": token(), "260": token(content="<y>", special=False)}}},
    "decoder with flags": {
        CONFIG: {"added_tokens_decoder": {"259": token(lstrip=True, rstrip=True), "260": token(content="<y>")}}
    },
    "decoder of known tokens": {CONFIG: {"added_tokens_decoder": {"0": token(content="<|eos|>", rstrip=True)}}},
    "decoder before map": {
        CONFIG: {"added_tokens_decoder": {"259": token()}, "eos_token": "<x>"}, MAP: {"eos_token": "<|pad|>"},
        ADDED: {"<y>": 300},
    },
    "added": {ADDED: {"<x>": 259, "<y>": 260}, CONFIG: {"eos_token": "<x>"}},
    "added out of order": {ADDED: {"<y>": 270, "<x>": 265}},
    "added and map": {ADDED: {"<x>": 259}, MAP: {"additional_special_tokens": ["<x>", "<z>"]}},
    "split": {CONFIG: {"split_special_tokens": True, "eos_token": "<|eos|>"}},
    "bos and eos are not added": {
        CONFIG: {"add_bos_token": True, "add_eos_token": True, "bos_token": "<|start|>", "eos_token": "<|eos|>"}
    },
    "settings that change no ids": {
        CONFIG: {"model_max_length": 4, "add_prefix_space": True, "clean_up_tokenization_spaces": True,
                 "padding_side": "left", "truncation_side": "left"}
    },
}  # fmt: skip


def write(folder: Path, files: dict[str, Any], tokenizer: Tokenizer | None = None) -> Path:
    (tokenizer or byte_tokenizer()).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **files.get(CONFIG, {})}
    for name, content in {**files, CONFIG: config}.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def variables(folder: Path) -> dict[str, str]:
    path = folder / CONFIG
    tokenizer, pad_token = load_tokenizer(folder / "tokenizer.json")
    fields = FileFields(path, json.loads(path.read_text()))
    return dict(read_special_tokens(folder, fields, tokenizer, pad_token).variables)


@pytest.mark.parametrize("files", FOLDERS)
@pytest.mark.parametrize("limited", [False, True])
def test_tokens_and_ids_are_those_of_transformers(tmp_path: Path, files: str, limited: bool) -> None:
    tokenizer = byte_tokenizer()
    if limited:
        tokenizer.enable_truncation(max_length=3)
        tokenizer.enable_padding(pad_token="<|pad|>", pad_id=2, length=9)
    folder = write(tmp_path, FOLDERS[files], tokenizer)
    reference: Any = AutoTokenizer.from_pretrained(folder)
    assert variables(folder) == reference.special_tokens_map
    model = load_text_model(folder)
    for text in TEXTS:
        for add in (False, True):
            expected = reference(text, add_special_tokens=add)["input_ids"]
            assert model.encode(text, add) == expected, text
            assert model.decode(expected, True) == reference.decode(
                expected, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "a number": ({CONFIG: {"eos_token": 3}}, "tokenizer_config.json: eos_token: is 3; must be an object"),
    "a list": ({CONFIG: {"bos_token": []}}, "tokenizer_config.json: bos_token: is a list; must be an object"),
    "no content": ({CONFIG: {"bos_token": {"lstrip": True}}}, "bos_token: is an object; must be a string, or an"),
    "content that is a number": ({CONFIG: {"bos_token": {"content": 3}}}, "bos_token.content: is 3; must be a string"),
    "a flag that is a text": (
        {CONFIG: {"bos_token": token(lstrip="no")}},
        "bos_token.lstrip: is 'no'; must be true or",
    ),
    "additional": ({CONFIG: {"additional_special_tokens": "x"}}, "additional_special_tokens: is 'x'; must be a list"),
    "one of the additional": ({CONFIG: {"additional_special_tokens": [1]}}, "additional_special_tokens.0: is 1; must"),
    "decoder": ({CONFIG: {"added_tokens_decoder": []}}, "added_tokens_decoder: is a list; must be an object"),
    "an id": ({CONFIG: {"added_tokens_decoder": {"x": TOKEN}}}, "added_tokens_decoder.x: must be a token id"),
    "a negative id": ({CONFIG: {"added_tokens_decoder": {"-1": TOKEN}}}, "added_tokens_decoder.-1: must be a token id"),
    "a huge id": ({CONFIG: {"added_tokens_decoder": {"9" * 99: TOKEN}}}, "must be a token id, up to 4294967295"),
    "map": ({MAP: {"eos_token": 3}}, "special_tokens_map.json: eos_token: is 3; must be an object"),
    "added": ({ADDED: {"<x>": "1"}}, "added_tokens.json: <x>: is '1'; must be a whole number"),
    "added, negative": ({ADDED: {"<x>": -1}}, "added_tokens.json: <x>: is -1; from 0 to 4294967295 is needed"),
    "a name with line ends": ({ADDED: {"a\nb": -1}}, r"added_tokens.json: a\nb: is -1"),
    "split": ({CONFIG: {"split_special_tokens": 1}}, "split_special_tokens: is 1; must be true or false"),
    "a surrogate": ({CONFIG: {"eos_token": "\ud800"}}, "eos_token: has a surrogate code point"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_token_is_one_line_with_file_and_field(tmp_path: Path, damage: str) -> None:
    files, problem = DAMAGED[damage]
    with pytest.raises(ModelUnsupported) as caught:
        load_text_model(write(tmp_path, files))
    assert problem in str(caught.value) and "\n" not in str(caught.value)
