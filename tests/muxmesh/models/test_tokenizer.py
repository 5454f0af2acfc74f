import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from muxmesh.errors import InvalidRequest, ModelUnsupported
from muxmesh.models.tokenizer import TextModel, byte_tokenizer, load_text_model

BYTES = byte_tokenizer()
MODEL = TextModel(BYTES)
USER = [{"role": "user", "content": "hi"}]


@given(st.binary(max_size=20))
def test_each_byte_is_one_token_from_id_3_on(data: bytes) -> None:
    text = data.decode("latin-1")
    token_ids = MODEL.encode(text, False)
    assert len(token_ids) == len(text.encode())
    assert all(3 <= token_id < 259 for token_id in token_ids)
    assert MODEL.decode(token_ids, False) == text


@pytest.mark.parametrize(("token", "token_id"), [("<|eos|>", 0), ("<|start|>", 1), ("<|pad|>", 2)])
def test_a_special_token_of_the_byte_tokenizer_is_one_token(token: str, token_id: int) -> None:
    token_ids = MODEL.encode(f"a{token}b", False)
    assert token_ids[1] == token_id and len(token_ids) == 3
    assert MODEL.decode(token_ids, skip_special_tokens=True) == "ab"
    assert MODEL.decode(token_ids, skip_special_tokens=False) == f"a{token}b"


def test_invalid_utf8_decodes_to_replacement_characters() -> None:
    first, second = MODEL.encode("é", False)
    assert MODEL.decode([second, first], False) == "\ufffd\ufffd"


def test_a_model_can_be_used_from_several_threads() -> None:
    texts = [f"text {number} é" * 20 for number in range(20)]
    with ThreadPoolExecutor(4) as pool:
        decoded = pool.map(lambda text: MODEL.decode(MODEL.encode(text, False), False), texts)
        assert list(decoded) == texts


def write_folder(folder: Path, config: object | None = None) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_without_a_folder_the_sim_engine_has_a_tokenizer_and_a_template() -> None:
    model = load_text_model(None)
    assert model.has_chat_template
    assert (
        model.render_chat([*USER, {"role": "assistant", "content": "yes"}]) == "user: hi\nassistant: yes\nassistant: "
    )


def test_the_tokenizer_of_a_folder_is_loaded(tmp_path: Path) -> None:
    assert load_text_model(write_folder(tmp_path)).encode("<|im_end|>", False) == [259]


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path: Path) -> None:
    """As in transformers, whose tokenizers apply them only if a call asks for it."""
    plain = load_text_model(write_folder(tmp_path)).encode("a longer text", False)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(max_length=8)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(tokenizer.encode("a longer text").ids) == 64
    assert load_text_model(tmp_path).encode("a longer text", False) == plain


@pytest.mark.parametrize(
    ("config", "token_id"),
    [({"eos_token": "<|im_end|>"}, 259), ({"eos_token": "</s>"}, 260), ({"eos_token": None}, None), ({}, None)],
)
def test_the_end_of_sequence_is_that_of_the_tokenizer(
    tmp_path: Path, config: dict[str, object], token_id: int | None
) -> None:
    assert load_text_model(write_folder(tmp_path, config)).eos_token_id == token_id


def test_the_template_of_a_folder_renders_a_conversation(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}" + (
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    folder = write_folder(tmp_path, {"chat_template": template, "bos_token": {"content": "<s>"}})
    assert load_text_model(folder).render_chat(USER) == "<s>[user]hi[assistant]"


@pytest.mark.parametrize(
    ("tokens", "rendered"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, "<s>|</s>"),
        ({"bos_token": {"content": "<s>"}}, "<s>|"),
        ({"bos_token": None}, "|"),
        ({}, "|"),
    ],
)
def test_special_tokens_are_variables_of_the_template(tmp_path: Path, tokens: dict[str, object], rendered: str) -> None:
    folder = write_folder(tmp_path, {"chat_template": "{{ bos_token }}|{{ eos_token }}", **tokens})
    assert load_text_model(folder).render_chat([]) == rendered


def test_a_template_block_leaves_no_blank_line(tmp_path: Path) -> None:
    template = "{% for m in messages %}\n    {%- if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}"
    folder = write_folder(tmp_path, {"chat_template": template})
    assert load_text_model(folder).render_chat(USER) == "hi\n"


def test_a_template_in_a_file_of_its_own_has_precedence(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"chat_template": "old"})
    (folder / "chat_template.jinja").write_text("new é", encoding="utf-8")
    assert load_text_model(folder).render_chat([]) == "new é"


def test_the_default_template_of_several_is_used(tmp_path: Path) -> None:
    templates = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    assert load_text_model(write_folder(tmp_path, {"chat_template": templates})).render_chat([]) == "d"


@pytest.mark.parametrize("config", [None, {}, {"chat_template": None}])
def test_a_model_without_a_template_rejects_chat(tmp_path: Path, config: dict[str, object] | None) -> None:
    model = load_text_model(write_folder(tmp_path, config))
    assert not model.has_chat_template
    with pytest.raises(InvalidRequest, match="chat: this model has no chat template; send `text` or `token_ids`"):
        model.render_chat(USER)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[3]['role'] }}", "has no element 3"),
        ("{{ ''.__class__.mro() }}", "is unsafe"),
        ("{{ messages.append(1) }}", "is not safely callable|unsafe"),
    ],
)
def test_a_conversation_that_the_template_rejects_is_an_invalid_request(
    tmp_path: Path, template: str, reason: str
) -> None:
    model = load_text_model(write_folder(tmp_path, {"chat_template": template}))
    with pytest.raises(InvalidRequest, match=rf"chat\.messages: rejected by the model's chat template: .*({reason})"):
        model.render_chat(USER)


def test_a_folder_without_a_tokenizer_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match=r"has no tokenizer\.json; convert the tokenizer to the `fast` format"):
        load_text_model(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(("content", "problem"), [('{"version": ', "not JSON"), ("[]", "is a list, not a JSON object")])
def test_a_damaged_json_file_is_named(tmp_path: Path, file: str, content: str, problem: str) -> None:
    (write_folder(tmp_path, {}) / file).write_text(content)
    with pytest.raises(ModelUnsupported, match=rf"/{file}(:1)?: {problem}"):
        load_text_model(tmp_path)


def test_a_template_that_cannot_be_compiled_leaves_text_working(tmp_path: Path) -> None:
    model = load_text_model(write_folder(tmp_path, {"chat_template": "{% for m in messages %}"}))
    assert not model.has_chat_template
    assert model.encode("<|im_end|>", False) == [259]
    with pytest.raises(InvalidRequest, match=r"chat: the model's chat template cannot be compiled: .*endfor"):
        model.render_chat(USER)


NO_TOKENIZERS: dict[str, object] = {
    "an empty object": {},
    "another object": {"a": 1},
    "null for the model": {"model": None},
    "an unknown model": {"model": {"type": "Nonsense"}},
    "no vocabulary": {"model": {"type": "BPE"}},
    "a vocabulary that is a list": {"model": {"type": "BPE", "vocab": [], "merges": []}},
    "merges of unknown tokens": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
    "an id below 0": {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
    "an id that is a float": {"model": {"type": "BPE", "vocab": {"a": 1.5}, "merges": []}},
    "an unknown token outside": {"model": {"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.5]]}},
    "an unknown normalizer": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "normalizer": {"type": "x"}},
    "a bad expression": {
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False},
    },
    "a damaged character map": {
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    },
    "a missing unknown token": {"model": {"type": "WordLevel", "vocab": {"c": 0}, "unk_token": "[UNK]"}},
}


def test_padding_to_a_huge_length_takes_no_memory(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    padding = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": 10**12}
    content["padding"] = {**padding, "pad_id": 0, "pad_type_id": 0, "pad_token": "<|pad|>"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert len(load_text_model(folder).encode("ab", True)) == 2


@pytest.mark.parametrize("content", NO_TOKENIZERS)
def test_json_that_is_no_tokenizer_is_refused_in_one_line(
    tmp_path: Path, content: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(NO_TOKENIZERS[content]))
    with pytest.raises(ModelUnsupported) as caught:
        load_text_model(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/tokenizer.json: is no tokenizer that `tokenizers` can read: ")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", ""), "a panic of the library writes nothing"


def test_a_text_that_the_tokenizer_cannot_encode_is_an_invalid_request() -> None:
    model = TextModel(Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]")))
    assert model.encode("a", False) == [0]
    with pytest.raises(InvalidRequest, match=r"text: cannot be encoded by the model's tokenizer: .*UNK"):
        model.encode("b", False)
