import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from muxmesh.errors import InvalidRequest, ModelUnsupported
from muxmesh.models.tokenizer import TextModel, byte_tokenizer, load_text_model

BYTES = byte_tokenizer()
MODEL = TextModel(BYTES, None, {})


@given(st.lists(st.integers(0, 258), max_size=40), st.booleans())
def test_pieces_of_any_tokens_are_the_whole_text(token_ids: list[int], skip: bool) -> None:
    detokenizer = MODEL.detokenizer(skip)
    assert "".join(map(detokenizer.feed, token_ids)) + detokenizer.flush() == MODEL.decode(token_ids, skip)


@given(st.text(max_size=30))
def test_no_piece_of_a_text_holds_half_a_character(text: str) -> None:
    detokenizer = MODEL.detokenizer(False)
    pieces = [detokenizer.feed(token) for token in MODEL.encode(text, False)]
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_an_open_character_at_the_end_becomes_a_replacement() -> None:
    detokenizer = MODEL.detokenizer(True)
    assert detokenizer.feed(MODEL.encode("é", False)[0]) == ""
    assert detokenizer.flush() == "\ufffd"


def write_folder(folder: Path, config: dict[str, object]) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_the_models_own_template_renders_a_conversation(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}" + (
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    folder = write_folder(tmp_path, {"chat_template": template, "bos_token": {"content": "<s>"}})
    assert load_text_model(folder).render_chat([{"role": "user", "content": "hi"}]) == "<s>[user]hi[assistant]"


def test_a_template_beside_the_config_wins(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"chat_template": "old"})
    (folder / "chat_template.jinja").write_text("new")
    assert load_text_model(folder).render_chat([]) == "new"


def test_one_of_several_templates_is_the_default(tmp_path: Path) -> None:
    templates = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    assert load_text_model(write_folder(tmp_path, {"chat_template": templates})).render_chat([]) == "d"


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no system role') }}", "{{ messages[3]['role'] }}", "{{ ''.__class__.mro() }}"]
)
def test_a_conversation_that_the_template_refuses_is_bad_input(tmp_path: Path, template: str) -> None:
    model = load_text_model(write_folder(tmp_path, {"chat_template": template}))
    with pytest.raises(InvalidRequest, match=r"chat\.messages: the model's chat template refuses"):
        model.render_chat([{"role": "user", "content": "x"}])


def test_a_model_without_a_template_refuses_chat() -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        MODEL.render_chat([{"role": "user", "content": "x"}])


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match=r"has no tokenizer\.json"):
        load_text_model(tmp_path)
